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
    let audit = Audit::with_size(path.clone(), true, 2000).unwrap();
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
fn refused_calls_of_strangers_are_bounded_and_counted() {
    let (max, _) = STRANGERS_MAX;
    let mut strangers = Strangers {
        since: Instant::now(),
        written: 0,
        left_out: 0,
    };
    assert!((0..max).all(|_| strangers.next() == Some(0)));
    assert_eq!((strangers.next(), strangers.next()), (None, None));
    strangers.since -= Duration::from_secs(2);
    assert_eq!((strangers.next(), strangers.next()), (Some(2), Some(0)));
}
