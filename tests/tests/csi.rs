//! The CSI driver beside real daemons, called over its socket: each call's required errors, and that it can be made
//! again. What needs block devices is tested in the virtual machine (`vm.rs`).

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::csi::v1::volume_capability::access_mode::Mode;
use quarry_tests::csi::v1::*;
use quarry_tests::csi::{
    Caller, Driver, SECRET, capability, done, of_snapshot, of_volume, refused, secrets, volume,
    writer,
};
use quarry_tests::{MIB, Site};
use tempfile::tempdir;
use tonic::Code;

const SIZE: i64 = 64 << 20;

#[test]
fn volume_is_made_found_again_grown_and_deleted_and_what_cannot_be_is_refused() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "one")?;
    let daemon = site.start()?;
    daemon.quarry(&["tenant", "create", "acme"])?;
    daemon.quarry(&["tenant", "create", "small", "--max-bytes", "1GiB"])?;
    let driver = Driver::start(&site, &[])?;
    let csi = &driver;

    let info = driver.call(driver.identity().get_plugin_info(GetPluginInfoRequest {}))?;
    ensure!(
        info.name == "csi.quarry.storage" && !info.vendor_version.is_empty(),
        "{info:?}"
    );
    let probe = driver.call(driver.identity().probe(ProbeRequest {}))?;
    ensure!(probe.ready == Some(true));

    let request = || CreateVolumeRequest {
        secrets: secrets(),
        ..volume("acme", "pvc-1", SIZE)
    };
    let made = done("create", csi.create(request()))?;
    ensure!(
        made.volume_id == "acme/pvc-1" && made.capacity_bytes == SIZE,
        "{made:?}"
    );
    ensure!(done("again", csi.create(request()))? == made);
    for (what, wrong) in [
        (
            "no name",
            CreateVolumeRequest {
                name: String::new(),
                ..request()
            },
        ),
        (
            "no capabilities",
            CreateVolumeRequest {
                volume_capabilities: Vec::new(),
                ..request()
            },
        ),
        (
            "no tenant",
            CreateVolumeRequest {
                parameters: HashMap::new(),
                ..request()
            },
        ),
        ("no such tenant", volume("nobody", "pvc-2", SIZE)),
        (
            "two writers",
            CreateVolumeRequest {
                volume_capabilities: vec![capability(Mode::MultiNodeMultiWriter, Some(""))],
                ..request()
            },
        ),
    ] {
        refused(what, csi.create(wrong), Code::InvalidArgument)?;
    }
    refused(
        "too large",
        csi.create(volume("acme", "pvc-2", i64::MAX)),
        Code::OutOfRange,
    )?;
    refused(
        "another size",
        csi.create(volume("acme", "pvc-1", 2 * SIZE)),
        Code::AlreadyExists,
    )?;
    let mut zstd = request();
    zstd.parameters
        .insert("compression".to_owned(), "zstd".to_owned());
    refused("another class", csi.create(zstd), Code::AlreadyExists)?;
    let above = csi.create(volume("small", "pvc-1", 2 << 30));
    refused("above the quota", above, Code::ResourceExhausted)?;
    let odd = done(
        "an odd name",
        csi.create(volume("acme", "Ünïcode / name", SIZE)),
    )?;
    ensure!(done("again", csi.create(volume("acme", "Ünïcode / name", SIZE)))? == odd);

    let capacity = |tenant: &str| {
        let parameters = [("tenant".to_owned(), tenant.to_owned())].into();
        let request = GetCapacityRequest {
            parameters,
            ..GetCapacityRequest::default()
        };
        done(
            "capacity",
            driver.call(driver.controller().get_capacity(request)),
        )
    };
    ensure!(capacity("small")?.available_capacity == 1 << 30);
    ensure!(capacity("acme")?.available_capacity == 1 << 60);

    let validate = |id: &str, capabilities| {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: id.to_owned(),
            volume_capabilities: capabilities,
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        driver.call(driver.controller().validate_volume_capabilities(request))
    };
    let confirmed = done("validate", validate("acme/pvc-1", vec![writer()]))?;
    ensure!(confirmed.confirmed.is_some());
    let many = vec![capability(Mode::MultiNodeMultiWriter, None)];
    let not = done("validate", validate("acme/pvc-1", many))?;
    ensure!(
        not.confirmed.is_none() && !not.message.is_empty(),
        "{not:?}"
    );
    refused(
        "validate",
        validate("", vec![writer()]),
        Code::InvalidArgument,
    )?;
    refused(
        "validate",
        validate("acme/pvc-1", Vec::new()),
        Code::InvalidArgument,
    )?;
    refused(
        "validate",
        validate("acme/none", vec![writer()]),
        Code::NotFound,
    )?;
    refused("validate", validate("none", vec![writer()]), Code::NotFound)?;

    volumes_are_listed_by_pages(&driver)?;

    let grown = done("expand", csi.expand("acme/pvc-1", 2 * SIZE))?;
    ensure!(
        grown.capacity_bytes == 2 * SIZE && grown.node_expansion_required,
        "{grown:?}"
    );
    ensure!(done("expand again", csi.expand("acme/pvc-1", SIZE))?.capacity_bytes == 2 * SIZE);
    refused("expand", csi.expand("acme/none", SIZE), Code::NotFound)?;
    refused("expand", csi.expand("", SIZE), Code::InvalidArgument)?;
    refused(
        "expand",
        csi.expand("acme/pvc-1", i64::MAX),
        Code::OutOfRange,
    )?;

    let nbd = daemon.attach("acme/pvc-1", &[])?;
    refused(
        "delete in use",
        csi.delete("acme/pvc-1"),
        Code::FailedPrecondition,
    )?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", "acme/pvc-1"])?;
    for _ in 0..2 {
        done("delete", csi.delete("acme/pvc-1"))?;
        done("delete what is none", csi.delete("no-such-id"))?;
    }
    refused("delete", csi.delete(""), Code::InvalidArgument)?;
    ensure!(
        daemon
            .json(&["trash", "list"])?
            .to_string()
            .contains("pvc-1")
    );

    ensure!(!driver.log().contains(SECRET) && driver.log().contains("CreateVolume"));
    ensure!(!daemon.log().contains(SECRET));
    driver.stop()?;
    daemon.stop()
}

fn volumes_are_listed_by_pages(driver: &Driver) -> Result<()> {
    let page = |max_entries, token: &str| {
        let starting_token = token.to_owned();
        let request = ListVolumesRequest {
            max_entries,
            starting_token,
        };
        driver.call(driver.controller().list_volumes(request))
    };
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let answer = done("list", page(1, &token))?;
        ensure!(answer.entries.len() <= 1);
        let volumes = answer.entries.into_iter().filter_map(|entry| entry.volume);
        seen.extend(volumes.map(|volume| volume.volume_id));
        token = answer.next_token;
        if token.is_empty() {
            break;
        }
    }
    let all = done("list", page(0, ""))?;
    ensure!(
        seen.len() == all.entries.len() && seen.contains(&"acme/pvc-1".to_owned()),
        "{seen:?}"
    );
    refused("list", page(0, "invalid-token"), Code::Aborted)?;
    refused("list", page(-1, ""), Code::InvalidArgument).map(drop)
}

#[test]
fn snapshots_and_clones_are_made_once_and_keep_what_they_need() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "one")?;
    let daemon = site.start()?;
    daemon.quarry(&["tenant", "create", "acme"])?;
    daemon.quarry(&["tenant", "create", "other"])?;
    let driver = Driver::start(&site, &["--services", "controller"])?;
    let csi = &driver;
    let source = done("create", csi.create(volume("acme", "pvc-1", SIZE)))?.volume_id;
    let another = done("create", csi.create(volume("acme", "pvc-2", SIZE)))?.volume_id;
    let mut nbd = daemon.attach(&source, &[])?;
    nbd.write(0, &[7; 4096], true)?;

    let snapshot = done("snapshot", csi.snapshot(&source, "nightly"))?;
    let told = (
        snapshot.snapshot_id.as_str(),
        snapshot.source_volume_id.as_str(),
    );
    ensure!(
        told == ("acme/pvc-1@nightly", source.as_str()),
        "{snapshot:?}"
    );
    ensure!(
        snapshot.ready_to_use && snapshot.size_bytes == SIZE && snapshot.creation_time.is_some()
    );
    ensure!(done("again", csi.snapshot(&source, "nightly"))? == snapshot);
    refused(
        "of another",
        csi.snapshot(&another, "nightly"),
        Code::AlreadyExists,
    )?;
    refused("no name", csi.snapshot(&source, ""), Code::InvalidArgument)?;
    refused("no source", csi.snapshot("", "n"), Code::InvalidArgument)?;
    refused(
        "no such source",
        csi.snapshot("acme/none", "n"),
        Code::NotFound,
    )?;
    nbd.write(0, &[8; 4096], true)?;
    let second = done("snapshot", csi.snapshot(&source, "later"))?;

    let list = |request: ListSnapshotsRequest| {
        let answer = done("list", csi.snapshots(request))?;
        let snapshots = answer
            .entries
            .into_iter()
            .filter_map(|entry| entry.snapshot);
        anyhow::Ok((snapshots.collect::<Vec<_>>(), answer.next_token))
    };
    let (first, next) = list(ListSnapshotsRequest {
        max_entries: 1,
        ..Default::default()
    })?;
    let (rest, end) = list(ListSnapshotsRequest {
        starting_token: next,
        ..Default::default()
    })?;
    ensure!([first, rest].concat() == [snapshot.clone(), second.clone()] && end.is_empty());
    let of_another = ListSnapshotsRequest {
        source_volume_id: another.clone(),
        ..Default::default()
    };
    ensure!(list(of_another)?.0.is_empty());
    let one = |id: &str| ListSnapshotsRequest {
        snapshot_id: id.to_owned(),
        ..Default::default()
    };
    ensure!(list(one(&second.snapshot_id))?.0.first() == Some(&second));
    ensure!(list(one("acme/none@x"))?.0.is_empty() && list(one("nonsense"))?.0.is_empty());
    let wrong = ListSnapshotsRequest {
        starting_token: "nonsense".to_owned(),
        ..Default::default()
    };
    refused("list", csi.snapshots(wrong), Code::Aborted)?;

    // Of a snapshot, larger than it; with rates of its own.
    let restore = || {
        let mut request = volume("acme", "restored", 2 * SIZE);
        request.volume_content_source = of_snapshot(&snapshot.snapshot_id);
        request
            .parameters
            .insert("iops".to_owned(), "500".to_owned());
        request
    };
    let restored = done("restore", csi.create(restore()))?;
    ensure!(restored.capacity_bytes == 2 * SIZE && restored.content_source.is_some());
    ensure!(done("again", csi.create(restore()))? == restored);
    ensure!(daemon.show("acme/restored")?["rates"]["iops"] == 500);
    let read = daemon.attach("acme/restored", &[])?.read_vec(0, 4096)?;
    ensure!(read == [7; 4096]);
    daemon.quarry(&["volume", "detach", "acme/restored"])?;
    let mut small = restore();
    small.name = "small".to_owned();
    small.capacity_range = Some(CapacityRange {
        required_bytes: 0,
        limit_bytes: SIZE / 2,
    });
    refused(
        "smaller than its source",
        csi.create(small),
        Code::OutOfRange,
    )?;
    let mut other = restore();
    other.volume_content_source = of_snapshot(&second.snapshot_id);
    refused("of another source", csi.create(other), Code::AlreadyExists)?;
    let mut foreign = restore();
    foreign
        .parameters
        .insert("tenant".to_owned(), "other".to_owned());
    refused(
        "of another tenant's",
        csi.create(foreign),
        Code::InvalidArgument,
    )?;
    let mut packed = restore();
    packed.name = "packed".to_owned();
    packed
        .parameters
        .insert("compression".to_owned(), "none".to_owned());
    refused(
        "of another class",
        csi.create(packed),
        Code::InvalidArgument,
    )?;
    let missing = |source| CreateVolumeRequest {
        volume_content_source: source,
        ..volume("acme", "missing", SIZE)
    };
    for source in [
        of_snapshot("acme/pvc-1@none"),
        of_volume("acme/none"),
        of_snapshot("x"),
    ] {
        refused(
            "no such source",
            csi.create(missing(source)),
            Code::NotFound,
        )?;
    }

    // Of a volume that is in use.
    let clone = |name: &str| CreateVolumeRequest {
        volume_content_source: of_volume(&source),
        ..volume("acme", name, SIZE)
    };
    let cloned = done("clone", csi.create(clone("copy")))?;
    ensure!(done("again", csi.create(clone("copy")))? == cloned);
    nbd.write(0, &[9; 4096], true)?;
    drop(nbd);
    ensure!(daemon.attach("acme/copy", &[])?.read_vec(0, 4096)? == [8; 4096]);
    daemon.quarry(&["volume", "detach", "acme/copy"])?;
    daemon.quarry(&["volume", "detach", &source])?;

    let said = refused(
        "with clones",
        csi.delete_snapshot(&snapshot.snapshot_id),
        Code::FailedPrecondition,
    )?;
    ensure!(said.contains("restored"), "{said}");
    refused(
        "with snapshots",
        csi.delete(&source),
        Code::FailedPrecondition,
    )?;
    done("delete", csi.delete("acme/restored"))?;
    daemon.quarry(&["trash", "purge", "--all"])?;
    for _ in 0..2 {
        done("delete", csi.delete_snapshot(&snapshot.snapshot_id))?;
        done("delete", csi.delete_snapshot(&second.snapshot_id))?;
        done("delete", csi.delete_snapshot("nonsense"))?;
    }
    refused("delete", csi.delete_snapshot(""), Code::InvalidArgument)?;
    // What was made to clone it goes with it, once the clone is gone for good.
    refused(
        "with a clone",
        csi.delete(&source),
        Code::FailedPrecondition,
    )?;
    done("delete", csi.delete("acme/copy"))?;
    // Cloned anew under the same name it has what the source has now: while the first is in the trash and needs its
    // snapshot, and when nothing does.
    for bytes in [[9_u8; 4096], [10; 4096]] {
        let again = done("clone anew", csi.create(clone("copy")))?;
        ensure!(done("again", csi.create(clone("copy")))? == again);
        let read = daemon.attach("acme/copy", &[])?.read_vec(0, 4096)?;
        ensure!(read == bytes, "{} instead of {}", read[0], bytes[0]);
        daemon.quarry(&["volume", "detach", "acme/copy"])?;
        done("delete", csi.delete("acme/copy"))?;
        daemon.quarry(&["trash", "purge", "--all"])?;
        daemon.attach(&source, &[])?.write(0, &[10; 4096], true)?;
        daemon.quarry(&["volume", "detach", &source])?;
    }
    let left = daemon.json(&["snapshot", "list", &source])?;
    ensure!(
        left.to_string().matches("csi-clone-").count() == 1,
        "{left}"
    );
    done("delete", csi.delete(&source))?;

    // A hundred calls at once for one volume make one, and those that come too early are told so.
    let calls = (0..20).map(|_| {
        let mut controller = driver.controller();
        async move { controller.create_volume(volume("acme", "racy", SIZE)).await }
    });
    let answers = driver.at_once(calls.collect());
    for answer in &answers {
        match answer {
            Ok(made) => ensure!(
                made.volume
                    .as_ref()
                    .is_some_and(|v| v.volume_id == "acme/racy")
            ),
            Err(status) => ensure!(status.code() == Code::Aborted, "{status}"),
        }
    }
    ensure!(answers.iter().any(Result::is_ok));
    driver.stop()?;
    daemon.stop()
}

#[test]
fn volume_has_one_node_and_one_that_is_given_up_is_fenced_and_does_not_come_back() -> Result<()> {
    let dir = tempdir()?;
    let sites = [
        Site::with_folder(dir.path(), "a")?,
        Site::with_folder(dir.path(), "b")?,
    ];
    let (a, b) = (sites[0].start()?, sites[1].start()?);
    a.quarry(&["tenant", "create", "acme"])?;
    let (on_a, on_b) = (
        Driver::start(&sites[0], &[])?,
        Driver::start(&sites[1], &[])?,
    );
    let csi = &on_b;
    let (node_a, node_b) = (on_a.node_info()?.node_id, csi.node_info()?.node_id);
    ensure!(node_a != node_b && node_a.len() <= 256);
    let id = done("create", csi.create(volume("acme", "db", SIZE)))?.volume_id;

    refused(
        "publish",
        csi.publish("", &node_a, writer()),
        Code::InvalidArgument,
    )?;
    refused(
        "publish",
        csi.publish(&id, "", writer()),
        Code::InvalidArgument,
    )?;
    refused(
        "publish",
        csi.publish("acme/none", &node_a, writer()),
        Code::NotFound,
    )?;
    refused(
        "publish",
        csi.publish(&id, "no-such-node", writer()),
        Code::NotFound,
    )?;
    let many = capability(Mode::MultiNodeMultiWriter, None);
    refused(
        "publish",
        csi.publish(&id, &node_a, many),
        Code::InvalidArgument,
    )?;
    let context = done("publish", csi.publish(&id, &node_a, writer()))?;
    ensure!(done("again", csi.publish(&id, &node_a, writer()))? == context);

    let mut nbd = a.attach(&id, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    a.sync(&id)?;
    done("again", csi.publish(&id, &node_a, writer()))?;
    let reader = capability(Mode::SingleNodeReaderOnly, Some("ext4"));
    refused(
        "publish",
        csi.publish(&id, &node_a, reader),
        Code::AlreadyExists,
    )?;
    let said = refused(
        "publish",
        csi.publish(&id, &node_b, writer()),
        Code::FailedPrecondition,
    )?;
    ensure!(said.contains(&node_a), "{said}");
    let readers = capability(Mode::MultiNodeReaderOnly, None);
    done("publish", csi.publish(&id, &node_b, readers))?;
    // It is not that node's.
    done("unpublish", csi.unpublish(&id, &node_b))?;
    ensure!(a.show(&id)?["state"] == "attached");

    // What only its host can do is asked of that host, if it can be reached.
    refused(
        "snapshot",
        csi.snapshot(&id, "nightly"),
        Code::FailedPrecondition,
    )?;
    let later = done("expand", csi.expand(&id, 2 * SIZE))?;
    ensure!(later.node_expansion_required);
    let with_peers = {
        on_b.stop()?;
        let peers = format!("unix://{}", sites[0].socket().display());
        Driver::start(&sites[1], &["--peers", &peers])?
    };
    let csi = &with_peers;
    done("expand", csi.expand(&id, 2 * SIZE))?;
    ensure!(a.show(&id)?["size_bytes"] == 2 * SIZE);
    nbd.write(MIB, &[2; 4096], true)?;
    let snapshot = done("snapshot", csi.snapshot(&id, "nightly"))?;
    done("delete", csi.delete_snapshot(&snapshot.snapshot_id))?;

    a.sync(&id)?;
    a.kill()?;
    drop(nbd);
    done("unpublish", csi.unpublish(&id, &node_a))?;
    done("again", csi.unpublish(&id, &node_a))?;
    done("publish", csi.publish(&id, &node_b, writer()))?;
    // The node is there again before the other has taken it: it is not taken back.
    let a = sites[0].start()?;
    ensure!(a.json(&["status"])?["volumes_attached"] == 0, "taken back");
    ensure!(a.show(&id)?["owner"].is_null());
    let mut nbd = b.attach(&id, &[])?;
    ensure!(nbd.read_vec(0, 4096)? == [1; 4096] && nbd.read_vec(MIB, 4096)? == [2; 4096]);
    nbd.write(0, &[3; 4096], true)?;
    drop(nbd);
    given_up_alive(csi, &a, &b, &id, [&node_a, &node_b])?;
    drop(on_a);
    for daemon in [a, b] {
        daemon.stop()?;
    }
    Ok(())
}

/// A node that is given up and lives: what it had acknowledged by then is kept, and it gives the volume back if
/// nobody uses it.
fn given_up_alive(
    csi: &Caller,
    a: &quarry_tests::Daemon,
    b: &quarry_tests::Daemon,
    id: &str,
    [node_a, node_b]: [&str; 2],
) -> Result<()> {
    b.quarry(&["volume", "detach", id])?;
    done("publish", csi.publish(id, node_a, writer()))?;
    let mut nbd = a.attach(id, &["--discard-unsent"])?;
    nbd.write(0, &[4; 4096], true)?;
    done("unpublish", csi.unpublish(id, node_a))?;
    ensure!(a.show(id)?["state"] == "detached");
    drop(nbd);
    done("publish", csi.publish(id, node_b, writer()))?;
    ensure!(b.attach(id, &[])?.read_vec(0, 4096)? == [4; 4096]);
    // By hand, of a host that the driver does not reach.
    let release = |from: &str| ["volume", "release", id, "--from", from].map(str::to_owned);
    let cache = |node: &str| node.split('/').nth(1).map(str::to_owned).context("a node");
    let call = |from: &str| {
        let arguments = release(from);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        a.site().quarry_json(&arguments)
    };
    call(&cache(node_a)?)?.refusal()?;
    call("no-such-host")?.refusal()?;
    let released = call(&cache(node_b)?)?.json()?;
    ensure!(released["released"] == true, "{released}");
    ensure!(call("whoever")?.json()?["released"] == false);
    let mut nbd = a.attach(id, &[])?;
    nbd.write(0, &[5; 4096], true)?;
    a.sync(id)?;
    // The other has not asked for its head since; by a write it will.
    let mut fenced = b.connect(id)?;
    let mut refused = false;
    for page in 0..2000 {
        if fenced.write(page * 4096, &[9; 4096], true).is_err() {
            refused = true;
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    ensure!(refused && b.show(id)?["state"] == "fenced", "not fenced");
    ensure!(nbd.read_vec(0, 4096)? == [5; 4096]);
    drop(nbd);
    a.quarry(&["volume", "detach", id])
}

#[test]
fn node_without_block_devices_refuses_and_undoes_nothing_that_is_not_there() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "one")?;
    let daemon = site.start()?;
    daemon.create("acme/db", 64 * MIB, &[])?;
    let zone = "topology.csi.quarry.storage/zone";
    let topology = format!("{zone}=a");
    let driver = Driver::start(&site, &["--topology", &topology])?;
    let csi = &driver;
    let info = csi.node_info()?;
    let segments = info.accessible_topology.context("a topology")?.segments;
    ensure!(segments.get(zone).is_some_and(|segment| segment == "a"));
    let place = |segment: &str| Topology {
        segments: [(zone.to_owned(), segment.to_owned())].into(),
    };
    let elsewhere = |segment| CreateVolumeRequest {
        accessibility_requirements: Some(TopologyRequirement {
            requisite: vec![place(segment)],
            preferred: Vec::new(),
        }),
        ..volume("acme", "placed", SIZE)
    };
    refused(
        "create",
        csi.create(elsewhere("b")),
        Code::ResourceExhausted,
    )?;
    ensure!(done("create", csi.create(elsewhere("a")))?.accessible_topology == [place("a")]);

    let staging = dir.path().join("staging");
    std::fs::create_dir(&staging)?;
    let text = |path: &Path| path.display().to_string();
    let stage = |id: &str, path: &str, use_as: Option<VolumeCapability>| {
        let request = NodeStageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: path.to_owned(),
            volume_capability: use_as,
            secrets: secrets(),
            ..NodeStageVolumeRequest::default()
        };
        driver.call(driver.node().node_stage_volume(request))
    };
    let at = text(&staging);
    refused(
        "stage",
        stage("", &at, Some(writer())),
        Code::InvalidArgument,
    )?;
    refused(
        "stage",
        stage("acme/db", "", Some(writer())),
        Code::InvalidArgument,
    )?;
    refused(
        "stage",
        stage("acme/db", "here", Some(writer())),
        Code::InvalidArgument,
    )?;
    refused("stage", stage("acme/db", &at, None), Code::InvalidArgument)?;
    refused(
        "stage",
        stage("acme/none", &at, Some(writer())),
        Code::NotFound,
    )?;
    let many = capability(Mode::MultiNodeMultiWriter, None);
    refused(
        "stage",
        stage("acme/db", &at, Some(many)),
        Code::FailedPrecondition,
    )?;
    let publish = |staging: &str, target: &str| {
        let request = NodePublishVolumeRequest {
            volume_id: "acme/db".to_owned(),
            staging_target_path: staging.to_owned(),
            target_path: target.to_owned(),
            volume_capability: Some(writer()),
            ..NodePublishVolumeRequest::default()
        };
        driver.call(driver.node().node_publish_volume(request))
    };
    let target = text(&dir.path().join("target"));
    refused("publish", publish(&at, ""), Code::InvalidArgument)?;
    refused("publish", publish("", &target), Code::FailedPrecondition)?;
    refused("publish", publish(&at, &target), Code::FailedPrecondition)?;
    for id in ["acme/db", "acme/none", "none"] {
        let request = NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.clone(),
        };
        done(
            "unpublish",
            driver.call(driver.node().node_unpublish_volume(request)),
        )?;
        let request = NodeUnstageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: at.clone(),
        };
        done(
            "unstage",
            driver.call(driver.node().node_unstage_volume(request)),
        )?;
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: at.clone(),
            ..NodeGetVolumeStatsRequest::default()
        };
        let stats = driver.call(driver.node().node_get_volume_stats(request));
        refused("stats", stats, Code::NotFound)?;
        let request = NodeExpandVolumeRequest {
            volume_id: id.to_owned(),
            volume_path: at.clone(),
            ..NodeExpandVolumeRequest::default()
        };
        let grown = driver.call(driver.node().node_expand_volume(request));
        refused("expand", grown, Code::NotFound)?;
    }
    ensure!(staging.is_dir() && daemon.show("acme/db")?["state"] == "detached");

    // Without its daemon it refuses calls, is not to be started anew for that, and goes on when that is there again.
    daemon.stop()?;
    let probe = done(
        "probe",
        driver.call(driver.identity().probe(ProbeRequest {})),
    )?;
    ensure!(probe.ready == Some(true));
    refused(
        "stage",
        stage("acme/db", &at, Some(writer())),
        Code::Unavailable,
    )?;
    let daemon = site.start()?;
    let probe = done(
        "probe",
        driver.call(driver.identity().probe(ProbeRequest {})),
    )?;
    ensure!(probe.ready == Some(true));
    ensure!(!driver.log().contains(SECRET));
    driver.stop()?;
    daemon.stop()
}
