use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use quarry_objfmt::{Sectors, VolumeName};

use super::*;
use crate::store::FolderStore;

fn tenant() -> TenantName {
    TenantName::new("acme").unwrap()
}

fn volume(byte: u8) -> VolumeId {
    VolumeId::from_bytes([byte; 16])
}

fn name(name: &str) -> KeyName {
    KeyName::new(name).unwrap()
}

fn private(path: &Path, text: &str, mode: u32) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn with_keyring(path: &Path) -> KeyService {
    KeyService::new(&quarry_config::Keys {
        keyring: Some(path.to_owned()),
        ..quarry_config::Keys::default()
    })
}

/// An encrypted volume with one key of its own and one of a parent's.
async fn head(service: &KeyService, by: &KeyName) -> Head {
    let (tenant, name) = (tenant(), VolumeName::new("db").unwrap());
    let mut wrapped = Vec::new();
    for of in [1, 2] {
        let key = service.fresh(&tenant, volume(of), KeyGeneration::FIRST, by);
        wrapped.push(key.await.unwrap());
    }
    Head {
        encryption: Encryption::Aes256Gcm,
        keys: first(wrapped),
        ..Head::fresh(volume(1), &tenant, &name, Sectors::new(8), 0)
    }
}

#[tokio::test]
async fn head_opens_for_its_tenant_with_its_key_and_without_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keyring");
    private(&path, &keyring_line(&name("k")), 0o600);
    let service = with_keyring(&path);
    let mut head = head(&service, &name("k")).await;
    let keys = service.open(&tenant(), &head).await.unwrap().unwrap();
    for of in [1, 2] {
        assert!(keys.newest(volume(of)).is_some());
    }
    let other = TenantName::new("other").unwrap();
    let refused = service.open(&other, &head).await.unwrap_err();
    assert!(matches!(refused, KeyError::Wrong { .. }), "{refused}");

    let none = KeyService::new(&quarry_config::Keys::default());
    let refused = none.open(&tenant(), &head).await.unwrap_err();
    assert!(
        matches!(refused, KeyError::NotConfigured { .. }),
        "{refused}"
    );
    // Another key of the same name, then none.
    private(&path, &keyring_line(&name("k")), 0o600);
    let refused = service.open(&tenant(), &head).await.unwrap_err();
    assert!(matches!(refused, KeyError::Wrong { .. }), "{refused}");
    private(&path, "", 0o600);
    let refused = service.open(&tenant(), &head).await.unwrap_err();
    assert!(refused.to_string().contains("has no key k"), "{refused}");

    head.keys.keys.retain(|key| key.volume != head.volume);
    let refused = service.open(&tenant(), &head).await.unwrap_err();
    assert!(matches!(refused, KeyError::Keyless { .. }), "{refused}");
    head.encryption = Encryption::None;
    assert!(service.open(&tenant(), &head).await.unwrap().is_none());
}

#[tokio::test]
async fn keys_wrapped_anew_need_the_earlier_key_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keyring");
    let (old, new) = (keyring_line(&name("k")), keyring_line(&name("k")));
    private(&path, &old, 0o600);
    let service = with_keyring(&path);
    let mut head = head(&service, &name("k")).await;
    let chunk = quarry_objfmt::ChunkId {
        volume: volume(2),
        epoch: quarry_objfmt::Epoch::new(1),
        seq: quarry_objfmt::ChunkSeq::new(1),
    };
    let before = service.open(&tenant(), &head).await.unwrap().unwrap();
    // Both for a while; the last wraps.
    private(&path, &format!("{}\n{}\n", *old, *new), 0o600);
    head.keys.keys = service
        .rewrap(&tenant(), &head.keys.keys, &name("k"))
        .await
        .unwrap();
    private(&path, &new, 0o600);
    let after = service.open(&tenant(), &head).await.unwrap().unwrap();
    // What one encrypts the other reads.
    let extent = quarry_objfmt::ChunkExtent {
        start: quarry_objfmt::Lba::ZERO,
        len: 1,
        body: quarry_objfmt::ExtentBody::Data { raw: 0 },
    };
    let params = quarry_objfmt::ChunkParams {
        id: chunk,
        first_write: quarry_objfmt::WriteSeq::new(1),
        last_write: quarry_objfmt::WriteSeq::new(1),
        cut_ms: 1,
        frame_sectors: 128,
        compression: quarry_objfmt::Compression::None,
        key: before.newest(volume(2)),
    };
    let made = quarry_objfmt::encode_chunk(&params, &[extent], &[7; 512]);
    let stored = &made.bytes[made.header.frames[0].stored_offset as usize..];
    let read = quarry_objfmt::decode_frame(stored, chunk, 0, 128, Some(&after));
    assert_eq!(read.unwrap()[..], [7; 512]);
}

#[tokio::test]
async fn program_that_wraps_binds_nothing_and_the_context_is_checked_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (program, away) = (dir.path().join("kms"), dir.path().join("away"));
    // It only turns the bytes round, and knows one key.
    let script = format!(
        "#!/bin/sh\n[ -e {} ] && {{ echo away >&2; exit 1; }}\n[ \"$2\" = k ] || exit 2\ntr '\\000-\\377' '\\200-\\377\\000-\\177'\n",
        away.display()
    );
    private(&program, &script, 0o700);
    let service = KeyService::new(&quarry_config::Keys {
        command: Some(program),
        ..quarry_config::Keys::default()
    });
    let mut head = head(&service, &name("k")).await;
    service.open(&tenant(), &head).await.unwrap().unwrap();
    let other = TenantName::new("other").unwrap();
    let refused = service.open(&other, &head).await.unwrap_err();
    assert!(matches!(refused, KeyError::Wrong { .. }), "{refused}");
    // The two keys in each other's place.
    let keys = &mut head.keys.keys;
    let (a, b) = (keys[0].bytes.clone(), keys[1].bytes.clone());
    (keys[0].bytes, keys[1].bytes) = (b, a);
    let refused = service.open(&tenant(), &head).await.unwrap_err();
    assert!(matches!(refused, KeyError::Wrong { .. }), "{refused}");

    private(&away, "", 0o600);
    let refused = service.open(&tenant(), &head).await.unwrap_err();
    assert!(
        matches!(&refused, KeyError::Unavailable { why, .. } if why.contains("away")),
        "{refused}"
    );
}

#[tokio::test]
async fn key_is_not_given_up_for_one_that_does_not_open_what_it_wraps() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("kms");
    // What the key `new` wraps is cut short, as by a pipe whose end nobody looks at.
    let script = "#!/bin/sh\nif [ \"$1 $2\" = \"wrap new\" ]; then head -c 20; cat >/dev/null; else cat; fi\n";
    private(&program, script, 0o700);
    let service = KeyService::new(&quarry_config::Keys {
        command: Some(program),
        ..quarry_config::Keys::default()
    });
    let head = head(&service, &name("k")).await;
    let (tenant, new) = (tenant(), name("new"));
    let rewrapped = service.rewrap(&tenant, &head.keys.keys, &new);
    let refused = rewrapped.await.unwrap_err().to_string();
    assert!(
        refused.contains("does not open what it has just wrapped"),
        "{refused}"
    );
}

/// Answers each request with what `answer` makes of its body.
fn serve(answer: fn(&str) -> String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = Vec::new();
            let mut part = [0; 4096];
            while !request.ends_with(b"}") {
                match stream.read(&mut part) {
                    Ok(read) if read > 0 => request.extend_from_slice(&part[..read]),
                    _ => break,
                }
            }
            let request = String::from_utf8(request).unwrap();
            let body = request.split("\r\n\r\n").nth(1).unwrap_or_default();
            // The client may have gone.
            let _ = stream.write_all(answer(body).as_bytes());
        }
    });
    url
}

fn http(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn service_that_answers_wraps_and_one_that_errs_is_tried_again() {
    let service = |url| {
        KeyService::new(&quarry_config::Keys {
            url: Some(url),
            ..quarry_config::Keys::default()
        })
    };
    // It gives back what it gets.
    let echo = |body: &str| {
        let question: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(["wrap", "unwrap"].contains(&question["operation"].as_str().unwrap()));
        assert_eq!(question["key"], "k");
        http("200 OK", &format!(r#"{{"data": {}}}"#, question["data"]))
    };
    let good = service(serve(echo));
    let head = head(&good, &name("k")).await;
    good.open(&tenant(), &head).await.unwrap().unwrap();

    type Answer = fn(&str) -> String;
    let bad: [(Answer, &str); 5] = [
        (|_| http("503 Service Unavailable", ""), "503"),
        (|_| http("200 OK", "hello"), "not the JSON"),
        (|_| http("200 OK", r#"{"data": "!"}"#), "not base64"),
        (|_| http("200 OK", &"x".repeat(70_000)), "more than"),
        (|_| "nonsense\r\n\r\n".to_owned(), "error"),
    ];
    for (answer, word) in bad {
        let refused = service(serve(answer)).open(&tenant(), &head).await;
        let refused = refused.unwrap_err();
        assert!(
            matches!(&refused, KeyError::Unavailable { why, .. } if why.contains(word)),
            "{refused}"
        );
    }
    let wrong = |_: &str| http("200 OK", r#"{"data": "QUFB"}"#);
    let refused = service(serve(wrong)).open(&tenant(), &head).await;
    assert!(matches!(refused, Err(KeyError::Wrong { .. })));
    let empty = service(serve(|_| http("200 OK", r#"{"data": ""}"#)));
    let refused = empty
        .wrap(None, &name("k"), b"for", b"it")
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("0 bytes"), "{refused}");
}

#[tokio::test]
async fn copies_get_the_next_free_number_and_earlier_ones_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    let path = dir.path().join("keyring");
    private(&path, &keyring_line(&name("k")), 0o600);
    let mut head = head(&with_keyring(&path), &name("k")).await;
    let (tenant, id) = (tenant(), head.volume);
    put_first_copy(&store, &tenant, id, &head.keys)
        .await
        .unwrap();
    assert_eq!(copy_problem(&store, &tenant, &head).await.unwrap(), None);
    // Left by a crash.
    let left = put_next_copy(&store, &tenant, id, head.keys.clone());
    assert_eq!(left.await.unwrap().revision, 2);
    let next = put_next_copy(&store, &tenant, id, head.keys.clone());
    let next = next.await.unwrap();
    assert_eq!(next.revision, 3);
    assert_eq!(copies(&store, &tenant, id).await.unwrap(), [1, 2, 3]);
    drop_copies_before(&store, &tenant, id, 3).await.unwrap();
    assert_eq!(copies(&store, &tenant, id).await.unwrap(), [3]);
    let (key, problem) = copy_problem(&store, &tenant, &head).await.unwrap().unwrap();
    assert!(key.ends_with("keys/00000001") && problem.contains("rekey"));
    head.keys = next;
    assert_eq!(copy_problem(&store, &tenant, &head).await.unwrap(), None);
}
