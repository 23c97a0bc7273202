//! The command line as a whole: parsed, carried out on a fake engine's control plane, printed.

use std::sync::Arc;

use clap::CommandFactory as _;
use serde_json::Value;

use super::*;
use crate::control::fake::{FakeDaemon, FakeEngine};

struct Ran {
    code: u8,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|e| panic!("{e}: {:?} {:?}", self.out, self.err))
    }
}

async fn quarry(socket: &std::path::Path, line: &str) -> Ran {
    let mut args: Vec<OsString> = vec!["quarry".into(), "--socket".into(), socket.into()];
    args.extend(line.split_whitespace().map(OsString::from));
    tokio::task::spawn_blocking(move || {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = run(args, &mut out, &mut err);
        Ran {
            code,
            out: String::from_utf8(out).unwrap(),
            err: String::from_utf8(err).unwrap(),
        }
    })
    .await
    .unwrap()
}

async fn daemon() -> FakeDaemon {
    FakeDaemon::start(Arc::new(FakeEngine::default())).await
}

#[test]
fn flags_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_line_of_the_manual_parses() {
    for line in [
        "demo",
        "demo --input disk.img",
        "serve --config quarry.toml",
        "serve --data-dir d --store s3://b/p --cache c --cache-size 1GiB --socket s --listen 127.0.0.1:1",
        "tenant create acme",
        "tenant list",
        "tenant delete acme",
        "token create --tenant acme --role admin --expires 90d --note builds",
        "token create --operator",
        "token list --tenant acme",
        "token revoke acme.k3j2h4m5n6p7q2r3",
        "volume create acme/db --size 100GiB",
        "volume create acme/db --size 1EiB --sector-size 4096 --durability object --compression zstd",
        "volume attach acme/db",
        "volume attach acme/db --via nbd --force --discard-unsent --read-only --output json",
        "volume attach acme/db --via ublk --owner qemu:kvm --mode 0660",
        "volume list --output json",
        "volume list --tenant acme",
        "volume show acme/db",
        "volume resize acme/db 200GiB",
        "volume create acme/db --size 1GiB --retain 24h",
        "volume retain acme/db 24h",
        "volume create acme/db --size 1GiB --iops 5000 --bandwidth 200MiB/s",
        "volume limit acme/db --iops 5000 --iops-burst 10000 --bandwidth 200MiB/s --bandwidth-burst 1GiB",
        "volume limit acme/db --none",
        "doctor",
        "csi --endpoint unix:///csi/csi.sock --services node --topology topology.csi.quarry.storage/zone=a",
        "csi --endpoint /csi/csi.sock --peers https://{host}:9443 --token-file t",
        "volume create acme/db --size 1GiB --key acme-2026",
        "volume create acme/db --size 1GiB --no-encryption",
        "volume rekey acme/db",
        "volume rekey acme/db --key acme-2027",
        "volume rekey acme/db --data",
        "key generate acme-2026",
        "volume attach acme/db --read-only --at 2026-11-25T03:00:00Z",
        "volume attach acme/db --at -2h",
        "volume attach acme/db --at 1764039600000",
        "volume detach acme/db@2026-11-25T03:00:00Z",
        "volume import disk.qcow2 acme/db",
        "volume import disk.img acme/db --format raw --size 200GiB --compression zstd --overwrite --attach --jobs 4",
        "volume import - acme/db --size 100GiB",
        "volume export acme/db disk.qcow2",
        "volume export acme/db - --format raw --force --jobs 64",
        "volume export acme/db@nightly disk.img",
        "volume export acme/db disk.img --at -2h",
        "volume sync acme/db",
        "volume release acme/db --from node-3",
        "volume compact acme/db",
        "volume compact acme/db --held",
        "volume flatten acme/db",
        "volume warm acme/db",
        "volume warm acme/db --range 0-10GiB --limit 20GiB",
        "volume evict acme/db",
        "volume detach acme/db",
        "volume delete acme/db",
        "volume attach acme/db@nightly --via nbd",
        "volume show acme/db@nightly",
        "volume detach acme/db@nightly",
        "volume verify acme/db@nightly --deep",
        "volume verify acme/db --snapshots",
        "volume clone acme/db@golden acme/test1",
        "volume rollback acme/db@nightly",
        "snapshot create acme/db@nightly",
        "snapshot list",
        "snapshot list acme/db --output json",
        "snapshot show acme/db@nightly",
        "snapshot delete acme/db@nightly",
        "volume delete acme/db --discard-unsent",
        "volume restore acme/db",
        "volume restore f7a4f3a0-0000-4000-8000-000000000000 --as db-old",
        "trash list --tenant acme",
        "trash purge f7a4f3a0-0000-4000-8000-000000000000",
        "trash purge --all --tenant acme",
        "trash purge --older-than 3d",
        "tenant delete acme --purge",
        "status --socket /s",
        "config check quarry.toml",
        "config example",
        "completions zsh",
    ] {
        let args = std::iter::once("quarry").chain(line.split_whitespace());
        if let Err(error) = Cli::command().try_get_matches_from(args) {
            panic!("{line}: {error}");
        }
    }
}

#[tokio::test]
async fn token_of_nobody_is_refused_with_both_that_it_can_be_of() {
    let nowhere = std::path::Path::new("/nonexistent/q.sock");
    let ran = quarry(nowhere, "token create").await;
    assert_eq!(ran.code, MISUSED);
    for flag in ["--tenant", "--operator"] {
        assert!(ran.err.contains(flag), "{}", ran.err);
    }
}

#[tokio::test]
async fn misuse_is_refused_before_any_daemon_is_asked() {
    let nowhere = std::path::Path::new("/nonexistent/q.sock");
    for line in [
        "token create",
        "token create --tenant acme",
        "token create --tenant acme --role operator",
        "token create --operator --tenant acme --role read",
        "volume create acme --size 1GiB",
        "volume create acme/db --size large",
        "volume create acme/db --size 1GiB --sector-size 1024",
        "volume create ../x/db --size 1GiB",
        "volume attach acme/db --via iscsi",
        "volume attach acme/db --owner a:b:c",
        "volume attach acme/db --mode 1777",
        "volume attach acme/db --mode rw",
        "volume resize acme/db",
        "volume resize acme/db large",
        "volume retain acme/db",
        "volume create acme/db --size 1GiB --key k --no-encryption",
        "volume rekey acme/db --key K",
        "volume release acme/db",
        "csi",
        "csi --endpoint csi.sock",
        "csi --endpoint /csi.sock --topology zone",
        "key generate",
        "volume retain acme/db 24",
        "volume attach acme/db --at yesterday",
        "volume resize acme/db@nightly 1GiB",
        "volume delete acme/db@nightly",
        "volume clone acme/db acme/test1",
        "volume rollback acme/db",
        "snapshot create acme/db",
        "snapshot create acme/db@../x",
        "snapshot create acme@nightly",
        "volume import acme/db",
        "volume import disk.img acme/db --jobs 0",
        "volume import disk.img acme/db --format iso",
        "volume export acme/db",
        "tenant create ACME",
        "trash purge",
        "volume warm acme/db --range 10GiB",
        "trash purge --all --older-than 3d",
        "volume restore db",
        "status --url https://storage1:9443",
        "tenant update acme",
        "volume",
        "serve --listen nowhere --output json",
    ] {
        let ran = quarry(nowhere, line).await;
        assert_eq!(ran.code, MISUSED, "{line}: {}", ran.err);
        assert!(!ran.err.is_empty(), "{line}");
        if line.ends_with("json") {
            assert_eq!(ran.json()["error"]["kind"], "usage");
        } else {
            assert_eq!(ran.out, "", "{line}");
        }
    }
}

#[test]
fn socket_that_is_said_wins_over_a_variable_that_names_another_daemon() {
    // A variable that is there, in place of those that a test cannot set.
    let there = |arg: clap::Arg| arg.env("PATH");
    let parsed = |line: &str| {
        let command = Cli::command()
            .mut_arg("url", there)
            .mut_arg("socket", there);
        let words = std::iter::once("quarry").chain(line.split_whitespace());
        let words: Vec<OsString> = words.map(OsString::from).collect();
        super::parse(command, &words).unwrap()
    };
    for line in ["--socket /s status", "status --socket /s"] {
        let cli = parsed(line);
        assert_eq!((cli.url, cli.socket), (None, Some("/s".into())), "{line}");
    }
    for line in ["--url https://h status", "status --url https://h"] {
        assert_eq!(parsed(line).url.as_deref(), Some("https://h"), "{line}");
    }
    let cli = parsed("status");
    assert!(cli.url.is_some() && cli.socket.is_some());
}

#[tokio::test]
async fn volume_from_the_command_line_lives_its_whole_life() {
    let daemon = daemon().await;
    let socket = daemon.socket();
    let ok = async |line: &str| {
        let ran = quarry(&socket, line).await;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{line}: {}", ran.out);
        ran
    };
    assert!(ok("tenant list").await.out.contains("quarry tenant create"));
    ok("tenant create acme").await;
    assert_eq!(
        ok("tenant list --output json").await.json()["tenants"][0]["name"],
        "acme"
    );
    assert!(ok("volume list").await.out.contains("quarry volume create"));
    let made = ok("volume create acme/db --size 100GiB --output json")
        .await
        .json();
    assert_eq!(
        (&made["size_bytes"], &made["state"]),
        (&(100_u64 << 30).into(), &"detached".into())
    );

    let attached = ok("volume attach acme/db --via nbd --output json")
        .await
        .json();
    let uri = "nbd+unix:///acme/db?socket=/run/nbd.sock";
    assert_eq!(
        attached,
        serde_json::json!({"volume": "acme/db", "via": "nbd", "uri": uri})
    );
    assert_eq!(ok("volume attach acme/db").await.out, format!("{uri}\n"));
    let list = ok("volume list").await.out;
    assert!(
        list.starts_with("VOLUME ") && list.contains("acme/db  100GiB  attached"),
        "{list}"
    );
    let shown = ok("volume show acme/db").await.out;
    assert!(
        shown.contains("dirty         5MiB\n") && shown.contains("75.0%"),
        "{shown}"
    );
    let shown = ok("volume show acme/db --output json").await.json();
    assert_eq!(
        (&shown["attached"]["uri"], &shown["dirty_bytes"]),
        (&uri.into(), &(5 << 20).into())
    );

    assert!(!shown.to_string().contains("size shown"), "{shown}");
    assert_eq!(
        ok("volume resize acme/db 200GiB").await.out,
        "acme/db: it has 200GiB; its device shows the old size\n"
    );
    let shown = ok("volume show acme/db").await.out;
    assert!(
        shown.contains("size          200GiB, ") && shown.contains("size shown    100GiB, until"),
        "{shown}"
    );
    assert_eq!(
        ok("volume resize acme/db 200GiB --output json")
            .await
            .json()["size_bytes"],
        200_u64 << 30
    );

    assert_eq!(
        ok("volume retain acme/db 36h").await.out,
        "acme/db: what it was is kept for 1day 12h\n"
    );
    let shown = ok("volume show acme/db").await.out;
    assert!(shown.contains("retained      1day 12h\n"), "{shown}");
    assert_eq!(
        ok("volume retain acme/db 0s").await.out,
        "acme/db: nothing is kept of what it was\n"
    );

    assert_eq!(
        ok("volume sync acme/db --output json").await.json()["done"],
        "synced"
    );
    let warmed = ok("volume warm acme/db --range 1GiB-3GiB --limit 1GiB")
        .await
        .out;
    let words =
        "acme/db: 1GiB were fetched into the cache; that is the limit, after 2GiB of 2GiB\n";
    assert_eq!(warmed, words);
    let evicted = ok("volume evict acme/db").await.out;
    assert!(
        evicted.starts_with("acme/db: 1MiB on the cache device and 4KiB in"),
        "{evicted}"
    );
    ok("volume detach acme/db").await;
    let deleted = ok("volume delete acme/db").await.out;
    let words = "it is in the trash until 1970-01-01T00:00:02Z; `quarry volume restore acme/db`";
    assert!(deleted.contains(words), "{deleted}");
    let list = ok("trash list").await.out;
    assert!(list.contains("1970-01-01T00:00:01Z"), "{list}");
    let line = "volume restore acme/db --as db2";
    assert_eq!(ok(line).await.out, "acme/db2 is there again\n");
    assert_eq!(ok("trash list").await.out, "the trash is empty\n");
    ok("volume delete acme/db2").await;
    let kept = quarry(&socket, "trash purge --older-than 1d").await;
    assert_eq!(kept.code, FAILED);
    assert!(
        kept.err
            .contains("1 of 1 volumes are not purged: it has clones"),
        "{}",
        kept.err
    );
    let purged = ok("trash purge --all").await.out;
    assert_eq!(purged, "acme/db2 is purged, 3 objects were deleted\n");
    ok("tenant delete acme").await;
    assert!(ok("status").await.out.contains("file:///store answers"));
    assert_eq!(ok("status --output json").await.json()["ready"], true);
    daemon.stop().await;
}

#[tokio::test]
async fn snapshot_from_the_command_line_lives_its_whole_life() {
    let daemon = daemon().await;
    let socket = daemon.socket();
    let ok = async |line: &str| {
        let ran = quarry(&socket, line).await;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{line}: {}", ran.out);
        ran
    };
    ok("tenant create acme").await;
    ok("volume create acme/db --size 1GiB").await;
    let none = ok("snapshot list acme/db").await.out;
    assert!(none.contains("quarry snapshot create"), "{none}");
    let made = ok("snapshot create acme/db@nightly").await.out;
    assert!(
        made.contains("up to write 7") && made.contains("acme/db@nightly"),
        "{made}"
    );
    let list = ok("snapshot list").await.out;
    assert!(
        list.contains("acme/db@nightly") && list.contains("kept"),
        "{list}"
    );
    let place = ok("volume attach acme/db@nightly --via nbd").await.out;
    assert_eq!(place, "nbd+unix:///acme/db@nightly?socket=/run/nbd.sock\n");
    ok("volume clone acme/db@nightly acme/copy").await;
    let shown = ok("volume show acme/copy").await.out;
    assert!(shown.contains("cloned from   acme/db@nightly\n"), "{shown}");
    let shown = ok("snapshot show acme/db@nightly").await.out;
    assert!(shown.contains("clones        acme/copy\n"), "{shown}");
    let refused = quarry(&socket, "snapshot delete acme/db@nightly").await;
    assert_eq!(refused.code, FAILED);
    assert!(refused.err.contains("acme/copy"), "{}", refused.err);
    let refused = quarry(&socket, "volume clone acme/db@nightly other/copy").await;
    assert!(refused.err.contains("acme/copy"), "{}", refused.err);
    ok("volume rollback acme/db@nightly").await;
    ok("volume delete acme/copy").await;
    let done = ok("snapshot delete acme/db@nightly --output json")
        .await
        .json();
    assert_eq!(done["done"], "deleted");
    let gone = quarry(&socket, "snapshot show acme/db@nightly --output json").await;
    assert_eq!(gone.json()["error"]["kind"], "not_found");
    daemon.stop().await;
}

#[tokio::test]
async fn verify_fails_with_findings_and_prints_one_document() {
    let daemon = daemon().await;
    let socket = daemon.socket();
    quarry(&socket, "tenant create acme").await;
    for name in ["good", "bad"] {
        quarry(&socket, &format!("volume create acme/{name} --size 1GiB")).await;
    }
    let good = quarry(&socket, "volume verify acme/good --deep").await;
    assert_eq!((good.code, good.err.as_str()), (0, ""));
    assert!(good.out.contains("nothing is wrong"), "{}", good.out);
    assert!(good.out.contains("frames"), "{}", good.out);

    let bad = quarry(&socket, "volume verify acme/bad").await;
    assert_eq!(bad.code, FAILED);
    let row = "t/acme/v/x/chunk/1/2  65536..131072        it is missing\n";
    assert!(bad.out.ends_with(row), "{}", bad.out);
    let words = "acme/bad is damaged in the store: 1 findings, 64KiB of its data cannot be read";
    assert!(bad.err.contains(words), "{}", bad.err);

    let bad = quarry(&socket, "volume verify acme/bad --output json").await;
    assert_eq!(bad.code, FAILED);
    assert!(bad.err.contains(words), "{}", bad.err);
    let json = bad.json();
    assert_eq!(json["error"]["kind"], "damaged");
    assert_eq!(json["findings"][0]["ranges"][0]["start"], 65_536);
    assert_eq!(json["unreadable_bytes"], 65_536);
    daemon.stop().await;
}

#[tokio::test]
async fn rescue_sends_its_flags_and_says_what_is_missing() {
    let daemon = daemon().await;
    let socket = daemon.socket();
    quarry(&socket, "tenant create acme").await;
    quarry(&socket, "volume create acme/db --size 1GiB").await;
    let ran = quarry(&socket, "volume rescue acme/db --sector-size 512").await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(ran.out.contains("5..9 of epoch 2"), "{}", ran.out);
    assert!(
        ran.out.contains("1 objects of the log behind its end"),
        "{}",
        ran.out
    );
    let words =
        "Nothing was written; to write it, give --id, --size, --durability, --compression and";
    assert!(ran.out.contains(words), "{}", ran.out);
    let line = "volume rescue acme/db --id f7a4f3a0-0000-4000-8000-000000000000 --size 1GiB \
                --sector-size 512 --durability object --compression none --apply --output json";
    let json = quarry(&socket, line).await.json();
    assert_eq!(json["applied"], true);
    assert_eq!(json["needs"], serde_json::json!([]));
    daemon.stop().await;
}

#[tokio::test]
async fn owner_and_mode_of_a_device_are_sent_and_shown() {
    let daemon = daemon().await;
    let socket = daemon.socket();
    quarry(&socket, "tenant create acme").await;
    quarry(&socket, "volume create acme/db --size 1GiB").await;
    let refused = quarry(&socket, "volume attach acme/db --via nbd --mode 0640").await;
    assert_eq!(refused.code, FAILED);
    assert!(refused.err.contains("by NBD"), "{}", refused.err);
    assert!(refused.err.contains("--via ublk"), "{}", refused.err);
    let line = "volume attach acme/db --via ublk --owner qemu:kvm --mode 640";
    assert_eq!(quarry(&socket, line).await.code, 0);
    let shown = quarry(&socket, "volume show acme/db").await.out;
    assert!(shown.contains("device owner  qemu:kvm\n"), "{shown}");
    assert!(shown.contains("device mode   0640\n"), "{shown}");
    let shown = quarry(&socket, "volume show acme/db --output json")
        .await
        .json();
    let attached = &shown["attached"];
    assert_eq!(
        (&attached["device_owner"], &attached["device_mode"]),
        (&"qemu:kvm".into(), &"0640".into())
    );
    daemon.stop().await;
}

#[tokio::test]
async fn failure_is_one_sentence_and_an_object_of_json() {
    let daemon = daemon().await;
    let ran = quarry(&daemon.socket(), "volume show acme/none --output json").await;
    assert_eq!(ran.code, FAILED);
    let sentence = "there is no volume acme/none; `quarry volume list` shows those that are there";
    assert_eq!(ran.err, format!("quarry: {sentence}\n"));
    let expected = serde_json::json!({"error": {
        "kind": "not_found",
        "message": "there is no volume acme/none",
        "remedy": "`quarry volume list` shows those that are there",
    }});
    assert_eq!(ran.json(), expected);
    let ran = quarry(&daemon.socket(), "volume show acme/none").await;
    assert_eq!((ran.code, ran.out.as_str()), (FAILED, ""));
    daemon.stop().await;
}

#[tokio::test]
async fn status_of_a_daemon_that_is_not_ready_fails() {
    let engine = Arc::new(FakeEngine::default());
    *engine.not_ready.lock() = Some("the store does not answer".to_owned());
    let daemon = FakeDaemon::start(engine).await;
    let ran = quarry(&daemon.socket(), "status").await;
    assert_eq!(ran.code, FAILED);
    assert_eq!(
        ran.err,
        "quarry: the daemon is not ready: the store does not answer; see its log\n"
    );
    assert!(ran.out.contains("file:///store\n"), "{}", ran.out);
    assert!(!ran.out.contains("answers"), "{}", ran.out);
    let ran = quarry(&daemon.socket(), "status --output json").await;
    assert_eq!(ran.json()["error"]["kind"], "unavailable");
    daemon.stop().await;
}

#[tokio::test]
async fn client_without_a_daemon_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("q.sock");
    let ran = quarry(&socket, "status --output json").await;
    assert_eq!(ran.code, FAILED);
    let message = format!("no daemon answers at {}", socket.display());
    assert_eq!(ran.json()["error"]["message"], message);
    assert!(
        ran.err
            .ends_with("start one with `quarry serve`, or name its socket with --socket\n"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn config_example_passes_its_own_check() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("quarry.toml");
    let example = quarry(dir.path(), "config example").await;
    std::fs::write(&file, &example.out).unwrap();
    let ran = quarry(dir.path(), &format!("config check {}", file.display())).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains(" is valid\n"), "{}", ran.out);

    std::fs::write(&file, "[cache]\nrma = \"1GiB\"\n").unwrap();
    let ran = quarry(
        dir.path(),
        &format!("config check {} --output json", file.display()),
    )
    .await;
    assert_eq!(ran.code, MISCONFIGURED);
    let error = &ran.json()["error"];
    assert_eq!(
        (&error["kind"], &error["remedy"]),
        (&"config".into(), &"did you mean `ram`?".into())
    );
}

#[tokio::test]
async fn misuse_is_told_to_programs_in_full() {
    let nowhere = std::path::Path::new("/nonexistent/q.sock");
    let told: [(&str, &[&str]); 8] = [
        (
            "volume release",
            &["were not provided: ", "--from <HOST>", "<VOLUME>"],
        ),
        (
            "volume create acme/db --size large",
            &["for '--size <SIZE>': ", "is not a size"],
        ),
        ("volume attach acme/db --via iscsi", &["[possible values: "]),
        (
            "trash purge acme/x",
            &["give its id, as `quarry trash list` shows"],
        ),
        (
            "volume retain acme/db forever",
            &["write a time such as 24h"],
        ),
        (
            "trash purge --older-than ages",
            &["write a time such as 24h"],
        ),
        ("tenant update acme", &["is to be changed"]),
        ("volume", &[]),
    ];
    for (line, words) in told {
        let ran = quarry(nowhere, &format!("--output json {line}")).await;
        assert_eq!(ran.code, MISUSED, "{line}: {}", ran.err);
        let json = ran.json();
        let message = json["error"]["message"].as_str().unwrap();
        for word in words {
            assert!(message.contains(word), "{line}: {message}");
        }
        let form = ["Usage", "error: ", "For more information", "\n"];
        assert!(!form.iter().any(|f| message.contains(f)), "{message}");
        assert!(!message.is_empty());
    }
}

#[test]
fn help_of_a_command_has_its_own_options_before_those_of_all() {
    let help = |words: &[&str]| {
        let shown = Cli::command().try_get_matches_from(words).unwrap_err();
        shown.render().to_string()
    };
    let text = help(&["quarry", "volume", "release", "--help"]);
    let (own, general) = text.split_once("\nGeneral options:\n").unwrap();
    assert!(own.contains("--from"), "{own}");
    for flag in ["--socket", "--url", "--token-file", "--ca", "--output"] {
        assert!(
            general.contains(flag) && !own.contains(&format!("\n      {flag}")),
            "{text}"
        );
    }
}

#[tokio::test]
async fn help_and_completions_go_to_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    for (line, holds) in [
        ("--help", "Examples:"),
        ("--help", "Exit codes: 0 done, 1 failed, 2 "),
        ("--version", env!("CARGO_PKG_VERSION")),
        ("completions bash", "quarry"),
    ] {
        let ran = quarry(dir.path(), line).await;
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{line}");
        assert!(ran.out.contains(holds), "{line}: {}", ran.out);
    }
}
