//! What Kubernetes does with volumes on two nodes, done to two daemons and their CSI drivers with real devices and
//! mounts: run in the guest by `tests/vm/guest-csi.sh`.
//!
//! usage: csi-scenario DIRECTORY

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::csi::v1::volume_capability::access_mode::Mode;
use quarry_tests::csi::v1::*;
use quarry_tests::csi::{
    Caller, Driver, capability, done, of_snapshot, of_volume, refused, volume, writer,
};
use quarry_tests::{Daemon, Ran, Site};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;

/// How long a fenced node may go on before it knows.
const FENCED_MAX: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let dir = std::env::args()
        .nth(1)
        .context("usage: csi-scenario DIRECTORY")?;
    let dir = Path::new(&dir);
    let done = scenario(dir);
    if done.is_err() {
        for name in ["a", "b"] {
            for log in ["daemon.log", "csi.log"] {
                let text = fs::read_to_string(dir.join(name).join(log)).unwrap_or_default();
                let lines: Vec<_> = text.lines().collect();
                let end = lines[lines.len().saturating_sub(40)..].join("\n");
                eprintln!("-- the end of {name}/{log}\n{end}");
            }
        }
    }
    done
}

/// A node: a daemon and its driver.
struct Node {
    site: Site,
    daemon: Daemon,
    driver: Driver,
    id: String,
    dir: PathBuf,
}

impl Node {
    fn start(site: Site, arguments: &[&str]) -> Result<Self> {
        let daemon = site.start()?;
        let driver = Driver::start(&site, arguments)?;
        let id = driver.node_info()?.node_id;
        let dir = site.root().to_path_buf();
        Ok(Self {
            site,
            daemon,
            driver,
            id,
            dir,
        })
    }

    fn staging(&self, id: &str) -> Result<String> {
        let path = self.dir.join("staging").join(id.replace('/', "-"));
        fs::create_dir_all(&path)?;
        Ok(path.display().to_string())
    }

    fn target(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn stage(
        &self,
        id: &str,
        context: &HashMap<String, String>,
        wish: VolumeCapability,
    ) -> Result<(), Status> {
        self.stage_of(id, context, HashMap::new(), wish)
    }

    fn stage_of(
        &self,
        id: &str,
        context: &HashMap<String, String>,
        of_class: HashMap<String, String>,
        wish: VolumeCapability,
    ) -> Result<(), Status> {
        let staging = self
            .staging(id)
            .map_err(|e| Status::internal(e.to_string()))?;
        let request = NodeStageVolumeRequest {
            volume_id: id.to_owned(),
            publish_context: context.clone(),
            volume_context: of_class,
            staging_target_path: staging,
            volume_capability: Some(wish),
            ..NodeStageVolumeRequest::default()
        };
        let answer = self
            .driver
            .call(self.driver.node().node_stage_volume(request));
        answer.map(drop)
    }

    fn unstage(&self, id: &str) -> Result<()> {
        let request = NodeUnstageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: self.staging(id)?,
        };
        let answer = self
            .driver
            .call(self.driver.node().node_unstage_volume(request));
        done("NodeUnstage", answer).map(drop)
    }

    fn mount(
        &self,
        id: &str,
        target: &str,
        wish: VolumeCapability,
        readonly: bool,
    ) -> Result<(), Status> {
        let staging = self
            .staging(id)
            .map_err(|e| Status::internal(e.to_string()))?;
        let request = NodePublishVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: staging,
            target_path: target.to_owned(),
            volume_capability: Some(wish),
            readonly,
            ..NodePublishVolumeRequest::default()
        };
        let answer = self
            .driver
            .call(self.driver.node().node_publish_volume(request));
        answer.map(drop)
    }

    fn unmount(&self, id: &str, target: &str) -> Result<()> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
        };
        let answer = self
            .driver
            .call(self.driver.node().node_unpublish_volume(request));
        done("NodeUnpublish", answer)?;
        ensure!(!Path::new(target).exists(), "{target} is there still");
        Ok(())
    }

    fn stats(&self, id: &str, at: &str) -> Result<NodeGetVolumeStatsResponse> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: at.to_owned(),
            ..NodeGetVolumeStatsRequest::default()
        };
        let answer = self
            .driver
            .call(self.driver.node().node_get_volume_stats(request));
        done("stats", answer)
    }

    fn total(&self, id: &str, at: &str) -> Result<i64> {
        let stats = self.stats(id, at)?;
        let abnormal = stats.volume_condition.as_ref().is_none_or(|c| c.abnormal);
        ensure!(!abnormal, "{stats:?}");
        Ok(stats.usage.first().context("usage")?.total)
    }

    fn grow(&self, id: &str, at: &str, size: i64) -> Result<i64> {
        let request = NodeExpandVolumeRequest {
            volume_id: id.to_owned(),
            volume_path: at.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            ..NodeExpandVolumeRequest::default()
        };
        let answer = self
            .driver
            .call(self.driver.node().node_expand_volume(request));
        Ok(done("NodeExpand", answer)?.capacity_bytes)
    }

    /// Published to this node, staged and mounted as a pod has it.
    fn give(
        &self,
        controller: &Caller,
        id: &str,
        target: &str,
        wish: &VolumeCapability,
    ) -> Result<()> {
        let context = done("publish", controller.publish(id, &self.id, wish.clone()))?;
        done("stage", self.stage(id, &context, wish.clone()))?;
        done("mount", self.mount(id, target, wish.clone(), false))
    }

    /// The other way round.
    fn take(&self, controller: &Caller, id: &str, target: &str) -> Result<()> {
        self.unmount(id, target)?;
        self.unstage(id)?;
        done("unpublish", controller.unpublish(id, &self.id))
    }
}

fn write(at: &str, name: &str, text: &str) -> std::io::Result<()> {
    let mut file = fs::File::create(Path::new(at).join(name))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::File::open(at)?.sync_all()
}

fn read(at: &str, name: &str) -> Result<String> {
    let path = Path::new(at).join(name);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn scenario(dir: &Path) -> Result<()> {
    let site = |name| -> Result<Site> { Ok(Site::with_folder(dir, name)?.cache_size("128MiB")) };
    let (site_a, site_b) = (site("a")?, site("b")?);
    let peers = format!("unix://{}", site_a.socket().display());
    let a = Node::start(site_a, &["--services", "node"])?;
    // Where the controller is, whose pod Kubernetes would have moved if this were the node that dies.
    let b = Node::start(site_b, &["--peers", &peers])?;
    ensure!(a.id != b.id, "two nodes are one");
    a.daemon.quarry(&["tenant", "create", "acme"])?;

    let id = file_system(&a, &b)?;
    snapshots_and_clones(&a, &b, &id)?;
    raw_block(&a, &b)?;
    never_formatted(&a, &b)?;
    let a = driver_killed(a, &id)?;
    let a = node_killed(a, &b, &id)?;
    node_given_up_alive(&a, &b, &id)?;
    done("delete", b.driver.delete("acme/restored"))?;
    b.daemon.quarry(&["trash", "purge", "--all"])?;
    done("delete", b.driver.delete_snapshot("acme/pvc-1@nightly"))?;
    done("delete", b.driver.delete(&id)).map(drop)
}

/// Made, published, staged, mounted, each twice; what does not fit is refused; grown while a pod has it.
fn file_system(a: &Node, b: &Node) -> Result<String> {
    let id = done(
        "create",
        b.driver.create(volume("acme", "pvc-1", 128 * MIB)),
    )?
    .volume_id;
    let (wish, target) = (writer(), a.target("pod"));
    for _ in 0..2 {
        a.give(&b.driver, &id, &target, &wish)?;
    }
    let twice = a.driver.at_once(
        (0..2)
            .map(|_| {
                let request = NodeStageVolumeRequest {
                    volume_id: id.clone(),
                    staging_target_path: a.staging(&id)?,
                    volume_capability: Some(wish.clone()),
                    ..NodeStageVolumeRequest::default()
                };
                let mut node = a.driver.node();
                anyhow::Ok(async move { node.node_stage_volume(request).await })
            })
            .collect::<Result<Vec<_>>>()?,
    );
    for answer in twice {
        ensure!(
            answer
                .as_ref()
                .err()
                .is_none_or(|s| s.code() == Code::Aborted),
            "{answer:?}"
        );
    }
    let xfs = capability(Mode::SingleNodeWriter, Some("xfs"));
    let context = HashMap::new();
    refused("as xfs", a.stage(&id, &context, xfs), Code::AlreadyExists)?;
    let ro = capability(Mode::SingleNodeReaderOnly, Some("ext4"));
    refused("read-only", a.stage(&id, &context, ro), Code::AlreadyExists)?;
    refused(
        "read-only",
        a.mount(&id, &target, wish.clone(), true),
        Code::AlreadyExists,
    )?;
    let second = a.target("pod-2");
    let refusal = a.mount(&id, &second, wish.clone(), false);
    refused("a second pod", refusal, Code::FailedPrecondition)?;
    write(&target, "first", "one")?;

    // A second pod of the node, which may only read.
    let shared = capability(Mode::SingleNodeMultiWriter, Some("ext4"));
    for _ in 0..2 {
        done("mount", a.mount(&id, &second, shared.clone(), true))?;
    }
    ensure!(read(&second, "first")? == "one");
    let error = write(&second, "no", "no")
        .err()
        .context("a write was taken")?;
    ensure!(error.raw_os_error() == Some(30), "{error}");
    a.unmount(&id, &second)?;
    a.unmount(&id, &second)?;

    let before = a.total(&id, &target)?;
    let grown = done("expand", b.driver.expand(&id, 256 * MIB))?;
    ensure!(grown.capacity_bytes == 256 * MIB && grown.node_expansion_required);
    for _ in 0..2 {
        ensure!(a.grow(&id, &target, 256 * MIB)? == 256 * MIB);
    }
    let after = a.total(&id, &target)?;
    ensure!(after > before + 100 * MIB, "{before} -> {after}");
    // And by the node alone.
    ensure!(a.grow(&id, &a.staging(&id)?, 288 * MIB)? == 288 * MIB);
    Ok(id)
}

/// A snapshot of a volume in use, and clones: larger, on another node, and beside their source.
fn snapshots_and_clones(a: &Node, b: &Node, id: &str) -> Result<()> {
    let target = a.target("pod");
    let snapshot = done("snapshot", b.driver.snapshot(id, "nightly"))?;
    write(&target, "second", "two")?;
    let restored = done(
        "restore",
        b.driver.create(CreateVolumeRequest {
            volume_content_source: of_snapshot(&snapshot.snapshot_id),
            ..volume("acme", "restored", 512 * MIB)
        }),
    )?;
    let there = b.target("restored");
    b.give(&b.driver, &restored.volume_id, &there, &writer())?;
    ensure!(read(&there, "first")? == "one" && read(&there, "second").is_err());
    let total = b.total(&restored.volume_id, &there)?;
    ensure!(total > 400 * MIB, "the file system has {total} of 512 MiB");
    b.take(&b.driver, &restored.volume_id, &there)?;
    // What is not written to is read on both nodes at once.
    let readers = capability(Mode::MultiNodeReaderOnly, Some("ext4"));
    for node in [a, b] {
        let there = node.target("reader");
        node.give(&b.driver, &restored.volume_id, &there, &readers)?;
        ensure!(read(&there, "first")? == "one" && write(&there, "no", "no").is_err());
    }
    for node in [a, b] {
        node.take(&b.driver, &restored.volume_id, &node.target("reader"))?;
    }

    let xfs = capability(Mode::SingleNodeWriter, Some("xfs"));
    let wish = |request| CreateVolumeRequest {
        volume_capabilities: vec![xfs.clone()],
        ..request
    };
    let source = done(
        "create",
        b.driver.create(wish(volume("acme", "xfs", 320 * MIB))),
    )?
    .volume_id;
    let (one, two) = (b.target("xfs"), b.target("xfs-copy"));
    b.give(&b.driver, &source, &one, &xfs)?;
    write(&one, "first", "one")?;
    let copy = done(
        "clone",
        b.driver.create(wish(CreateVolumeRequest {
            volume_content_source: of_volume(&source),
            ..volume("acme", "xfs-copy", 448 * MIB)
        })),
    )?
    .volume_id;
    // On the same node, though both have the same UUID.
    b.give(&b.driver, &copy, &two, &xfs)?;
    ensure!(read(&two, "first")? == "one");
    ensure!(b.total(&copy, &two)? > 380 * MIB);
    b.take(&b.driver, &copy, &two)?;
    b.take(&b.driver, &source, &one)
}

/// A device as it is.
fn raw_block(a: &Node, b: &Node) -> Result<()> {
    let wish = capability(Mode::SingleNodeWriter, None);
    let request = CreateVolumeRequest {
        volume_capabilities: vec![wish.clone()],
        ..volume("acme", "raw", 64 * MIB)
    };
    let id = done("create", b.driver.create(request))?.volume_id;
    let target = a.target("device");
    for _ in 0..2 {
        a.give(&b.driver, &id, &target, &wish)?;
    }
    ensure!(
        fs::metadata(&target)?.file_type().is_block_device(),
        "no device"
    );
    let refusal = a.mount(&id, &a.target("device-2"), wish.clone(), false);
    refused("a second pod", refusal, Code::FailedPrecondition)?;
    let refusal = a.mount(&id, &target, wish.clone(), true);
    refused("without writes", refusal, Code::FailedPrecondition)?;
    let mut device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&target)?;
    device.write_all(&[7; 4096])?;
    device.sync_all()?;
    drop(device);
    ensure!(a.total(&id, &target)? == 64 * MIB);
    done("expand", b.driver.expand(&id, 96 * MIB))?;
    ensure!(a.grow(&id, &target, 96 * MIB)? == 96 * MIB);
    ensure!(a.total(&id, &target)? == 96 * MIB);
    a.take(&b.driver, &id, &target)?;
    ensure!(a.daemon.show(&id)?["state"] == "detached");
    Ok(())
}

/// What has data on it and no file system is not formatted, and what failed is not attached any more.
fn never_formatted(a: &Node, b: &Node) -> Result<()> {
    let id = "acme/raw";
    let context = done("publish", b.driver.publish(id, &a.id, writer()))?;
    let said = refused(
        "data",
        a.stage(id, &context, writer()),
        Code::FailedPrecondition,
    )?;
    ensure!(said.contains("not formatted"), "{said}");
    ensure!(a.daemon.show(id)?["state"] == "detached", "left attached");
    refused(
        "another node",
        b.stage(id, &context, writer()),
        Code::FailedPrecondition,
    )?;
    let wish = capability(Mode::SingleNodeWriter, None);
    done("stage", a.stage(id, &context, wish.clone()))?;
    let target = a.target("device");
    done("mount", a.mount(id, &target, wish, false))?;
    ensure!(fs::read(&target)?[..4096] == [7; 4096], "the data are gone");
    a.take(&b.driver, id, &target)
}

/// A driver that was killed goes on: nothing was in its memory alone.
fn driver_killed(a: Node, id: &str) -> Result<Node> {
    let Node {
        site,
        daemon,
        driver,
        id: node,
        dir,
    } = a;
    // Dropped, it is killed.
    drop(driver);
    let driver = Driver::start(&site, &["--services", "node"])?;
    let a = Node {
        site,
        daemon,
        driver,
        id: node,
        dir,
    };
    let target = a.target("pod");
    done("stage", a.stage(id, &HashMap::new(), writer()))?;
    done("mount", a.mount(id, &target, writer(), false))?;
    ensure!(read(&target, "second")? == "two");
    Ok(a)
}

/// The node dies with a volume in use; Kubernetes gives it up, and the pod goes on elsewhere. The node comes back.
fn node_killed(a: Node, b: &Node, id: &str) -> Result<Node> {
    let (target, there) = (a.target("pod"), b.target("pod"));
    write(&target, "third", "three")?;
    a.daemon.sync(id)?;
    let Node {
        site,
        daemon,
        driver,
        id: node,
        ..
    } = a;
    daemon.kill()?;
    drop(driver);

    let refusal = b.driver.publish(id, &b.id, writer());
    refused("while it is the other's", refusal, Code::FailedPrecondition)?;
    done("unpublish", b.driver.unpublish(id, &node))?;
    b.give(&b.driver, id, &there, &writer())?;
    for (name, text) in [("first", "one"), ("second", "two"), ("third", "three")] {
        ensure!(read(&there, name)? == text, "{name}");
    }
    write(&there, "fourth", "four")?;

    let a = Node::start(site, &["--services", "node"])?;
    ensure!(a.id == node, "another node: {}", a.id);
    ensure!(
        a.daemon.show(id)?["state"] == "attached elsewhere",
        "taken back"
    );
    // What the kubelet does with what it finds of before.
    a.unmount(id, &target)?;
    a.unstage(id)?;
    ensure!(read(&there, "fourth")? == "four");
    b.take(&b.driver, id, &there)?;
    Ok(a)
}

/// Kubernetes gives a node up that lives, with a pod on it that writes: its writes fail from then on, and are nowhere.
fn node_given_up_alive(a: &Node, b: &Node, id: &str) -> Result<()> {
    let (target, there) = (a.target("pod"), b.target("pod"));
    a.give(&b.driver, id, &target, &writer())?;
    write(&target, "fifth", "five")?;
    done("unpublish", b.driver.unpublish(id, &a.id))?;
    b.give(&b.driver, id, &there, &writer())?;
    // It was sent before the volume was taken.
    ensure!(read(&there, "fifth")? == "five");
    let begun = Instant::now();
    for number in 0.. {
        if write(&target, &format!("late-{number}"), "late").is_err() {
            break;
        }
        ensure!(
            begun.elapsed() < FENCED_MAX,
            "a node that was given up writes on"
        );
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(a.daemon.show(id)?["state"] == "fenced");
    let condition = a
        .stats(id, &target)?
        .volume_condition
        .context("a condition")?;
    ensure!(
        condition.abnormal && !condition.message.is_empty(),
        "{condition:?}"
    );
    a.unmount(id, &target)?;
    a.unstage(id)?;
    ensure!(a.daemon.show(id)?["state"] == "attached elsewhere");
    let names = fs::read_dir(&there)?;
    for name in names {
        let name = name?.file_name();
        ensure!(
            !name.to_string_lossy().starts_with("late"),
            "{name:?} is there"
        );
    }
    b.take(&b.driver, id, &there)?;
    // It has writes that are in nobody's volume: it takes that again only if it need not keep them.
    let context = done("publish", b.driver.publish(id, &a.id, writer()))?;
    let keep = [("keepUnsent".to_owned(), "true".to_owned())].into();
    let kept = a.stage_of(id, &context, keep, writer());
    let said = refused("unsent", kept, Code::FailedPrecondition)?;
    ensure!(said.contains("discard-unsent"), "{said}");
    a.give(&b.driver, id, &target, &writer())?;
    ensure!(read(&target, "fifth")? == "five");
    a.take(&b.driver, id, &target)?;
    let checked = Ran::run(&mut b.site.command(&["volume", "verify", id, "--deep"]))?;
    checked.ok().map(drop)
}
