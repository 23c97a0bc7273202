//! The log's file: whole lines, bounded, and what happens when it cannot be written.

use serde_json::json;

use super::super::super::endpoints::ENDPOINTS;
use super::*;
use crate::control::AttachOptions;

fn told(target: &str) -> Told {
    let endpoint = ENDPOINTS.iter().find(|e| e.path == "/v1/volumes");
    let uri = axum::http::Request::builder().uri(target);
    let (parts, ()) = uri.body(()).unwrap().into_parts();
    Told::new(endpoint.unwrap(), &parts)
}

/// A log of small files, on a host that may be slow.
fn with_size(path: PathBuf, required: bool, file_bytes_max: u64) -> Audit {
    Audit::with_limits(path, required, file_bytes_max, Duration::from_secs(60)).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

#[test]
fn options_of_a_body_are_told_and_neither_urls_nor_what_is_not_known() {
    let mut told = told("/v1/volumes/acme/db/attach");
    let body = json!({
        "name": "db", "force": true, "discard_unsent": false, "from": "a-cache", "key": "acme-2026",
        "rates": {"iops": 5, "token": "hunter2"},
        "note": "hunter2", "endpoint": "https://id:hunter2@s3", "size_bytes": {"deep": "hunter2"},
        "store": {"url": "s3://b/p", "endpoint": "https://id:hunter2@s3"},
        "durability": "hunter2".repeat(100),
    });
    told.name_what_is_in(body.to_string().as_bytes());
    let line = serde_json::to_value(&told).unwrap();
    assert_eq!(line["names"], json!({"name": "db"}));
    let options = json!({
        "force": true, "discard_unsent": false, "from": "a-cache", "key": "acme-2026", "rates": {"iops": 5},
    });
    assert_eq!(line["options"], options);
    assert!(!line.to_string().contains("hunter2"), "{line}");
}

#[test]
fn options_of_an_attachment_are_all_told() {
    let options = AttachOptions {
        device_owner: Some("qemu:kvm".parse().unwrap()),
        device_mode: Some("0660".parse().unwrap()),
        ..AttachOptions::default()
    };
    let options = serde_json::to_value(&options).unwrap();
    let mut told = told("/v1/volumes/acme/db/attach");
    told.name_what_is_in(options.to_string().as_bytes());
    assert_eq!(Value::Object(told.options), options);
}

#[tokio::test]
async fn file_that_is_full_is_put_aside_and_a_bounded_number_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let audit = with_size(path.clone(), true, 2000);
    for n in 0..200 {
        drop(
            audit
                .begin(told(&format!("/v1/volumes?{n}")))
                .await
                .unwrap(),
        );
    }
    while audit.stats().lines < 400 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut files: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    assert_eq!(files.len(), FILES_MAX);
    let mut newest = 0;
    for file in &files {
        let found = fs::metadata(file).unwrap();
        assert!(found.len() <= 2000 && found.mode() & 0o777 == 0o600);
        newest += lines(file)
            .iter()
            .filter(|l| l["target"] == "/v1/volumes?199")
            .count();
    }
    assert_eq!(newest, 2);
}

#[tokio::test]
async fn line_after_a_torn_one_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(&path, "{\"torn").unwrap();
    let audit = Audit::open(path.clone(), true).unwrap();
    drop(audit.begin(told("/v1/volumes")).await.unwrap());
    let text = fs::read_to_string(&path).unwrap();
    let second = text.lines().nth(1).unwrap();
    let line: Value = serde_json::from_str(second).unwrap();
    assert_eq!(line["event"], "begin");
}

#[tokio::test]
async fn file_that_was_moved_away_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let audit = Audit::open(path.clone(), true).unwrap();
    fs::rename(&path, dir.path().join("mine")).unwrap();
    let entry = audit.begin(told("/v1/volumes")).await.unwrap();
    assert_eq!(lines(&path)[0]["event"], "begin");
    drop(entry);
}

#[tokio::test]
async fn log_that_cannot_be_written_refuses_changes_only_where_it_must_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none/a.jsonl");
    assert_eq!(
        Audit::open(path.clone(), true).unwrap_err().kind,
        Kind::Unavailable
    );
    let audit = Audit::open(path.clone(), false).unwrap();
    assert!(audit.begin(told("/v1/volumes")).await.is_ok());
    assert!(audit.problem().unwrap().contains("a.jsonl"));
    assert!(audit.stats().failures >= 2);
    fs::create_dir(path.parent().unwrap()).unwrap();
    let audit = Audit::open(path.clone(), true).unwrap();
    assert_eq!(audit.problem(), None);
    fs::remove_file(&path).unwrap();
    fs::remove_dir(path.parent().unwrap()).unwrap();
    let refused = audit.begin(told("/v1/volumes")).await;
    assert_eq!(refused.err().unwrap().kind, Kind::Unavailable);
    fs::create_dir(path.parent().unwrap()).unwrap();
    assert!(audit.begin(told("/v1/volumes")).await.is_ok());
    assert_eq!(audit.problem(), None);
}

#[test]
fn refused_calls_of_nobody_and_of_each_tenant_are_bounded_and_counted() {
    let (max, _) = REFUSALS_MAX;
    let mut refusals = Refusals::new();
    assert!((0..max).all(|_| refusals.next() == Some(0)));
    assert_eq!((refusals.next(), refusals.next()), (None, None));
    refusals.since -= Duration::from_secs(2);
    assert_eq!((refusals.next(), refusals.next()), (Some(2), Some(0)));
}

fn told_of(caller: &str, tenant: Option<&str>) -> Told {
    Told {
        caller: Some(caller.to_owned()),
        tenant: tenant.map(ToOwned::to_owned),
        ..told("/v1/volumes/zebra/stripes")
    }
}

#[tokio::test]
async fn tenant_that_is_refused_again_and_again_does_not_push_out_what_was_done() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let audit = with_size(path.clone(), false, 20_000);
    let done = || Outcome {
        status: 200,
        word: None,
    };
    let entry = audit.begin(told("/v1/volumes/acme/db")).await.unwrap();
    entry.end(done()).await;
    let error = ApiError::new(Kind::Denied, "m", "r");
    let refused = Refused(axum::http::StatusCode::FORBIDDEN, error);
    // As long as what the files hold, twice.
    for _ in 0..2000 {
        audit
            .denied(told_of("token t1", Some("acme")), &refused)
            .await;
        let looked = told_of("token t1", Some("acme"));
        audit.asked_for_anothers(looked, done()).await;
    }
    // Others are told of as before.
    audit
        .denied(told_of("token t2", Some("zebra")), &refused)
        .await;
    audit.denied(told_of("token t3", None), &refused).await;
    let mut all = Vec::new();
    for entry in fs::read_dir(dir.path()).unwrap() {
        all.append(&mut lines(&entry.unwrap().path()));
    }
    let of = |key: &str, value: &str| all.iter().filter(|l| l[key] == value).count();
    assert_eq!(of("event", "begin"), 1);
    assert_eq!(of("tenant", "zebra"), 1);
    assert_eq!(of("caller", "token t3"), 1);
    let (max, _) = REFUSALS_MAX;
    assert!(of("tenant", "acme") >= max as usize);
    let acme = Some("acme".to_owned());
    let untold = audit.0.refusals.lock().get(&acme).map_or(0, |r| r.left_out);
    let told = all.iter().filter(|l| l["tenant"] == "acme");
    let told: u64 = told.map(|l| 1 + l["left_out"].as_u64().unwrap_or(0)).sum();
    assert_eq!(told + u64::from(untold), 4000);
}

#[test]
fn line_of_a_large_body_is_short_and_says_that_something_is_left_out() {
    let mut body = Map::new();
    for key in NAMES.iter().chain(OPTIONS) {
        body.insert((*key).to_owned(), "\u{1}".repeat(340).into());
    }
    body.insert("force".to_owned(), true.into());
    body.insert("size_bytes".to_owned(), 4096.into());
    body.insert(
        "rates".to_owned(),
        json!({"iops": 5, "via": "x".repeat(500)}),
    );
    let mut told = told("/v1/volumes");
    told.name_what_is_in(Value::Object(body).to_string().as_bytes());
    let line = serde_json::to_value(&told).unwrap();
    assert_eq!(line["shortened"], true);
    assert_eq!(line["options"]["force"], true);
    assert_eq!(line["options"]["size_bytes"], 4096);
    assert_eq!(line["options"]["rates"]["iops"], 5);
    assert!(line.to_string().len() < BODY_BYTES_MAX + 512, "{line}");
}

#[test]
fn file_system_that_hangs_keeps_one_thread_and_is_waited_for_no_longer_than_a_line_may_take() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(2)
        .enable_time()
        .build()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let short = Duration::from_millis(50);
    let logs = [false, true].map(|required| {
        let path = dir.path().join(format!("{required}.jsonl"));
        Audit::with_limits(path, required, FILE_BYTES_MAX, short).unwrap()
    });
    let limit = Duration::from_secs(20);
    for audit in logs {
        // Who writes waits for this, as for a file system.
        let (held, holds) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let inner = Arc::clone(&audit.0);
        let hangs = std::thread::spawn(move || {
            let open = inner.open.lock();
            held.send(()).unwrap();
            let _ = gone.recv();
            drop(open);
        });
        holds.recv().unwrap();
        runtime.block_on(async {
            let begun = (0..8).map(|_| audit.begin(told("/v1/volumes")));
            let begun = timeout(limit, futures::future::join_all(begun)).await;
            let required = audit.0.required;
            for begun in begun.expect("nobody waits for it") {
                assert_eq!(begun.is_err(), required);
                assert!(begun.err().is_none_or(|e| e.kind == Kind::Unavailable));
            }
            assert!(audit.stats().failures >= 8);
            assert!(audit.problem().unwrap().contains("takes too long"));
            let other = tokio::task::spawn_blocking(|| 7);
            assert_eq!(timeout(limit, other).await.unwrap().unwrap(), 7);
            drop(go);
            let again = async {
                while audit.begin(told("/v1/volumes")).await.is_err() || audit.problem().is_some() {
                    tokio::time::sleep(short).await;
                }
            };
            timeout(limit, again).await.unwrap();
        });
        hangs.join().unwrap();
    }
}
