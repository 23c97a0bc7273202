//! Every endpoint by every role, held to a table of its own: an endpoint that is not in it fails the test.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request};
use quarry_objfmt::{TenantName, VolumeName};
use tower::ServiceExt as _;

use super::super::endpoints::{ENDPOINTS, Endpoint, guarded};
use super::super::fake::FakeEngine;
use super::super::{Engine, Problem, VolumeRef, VolumeSpec};
use super::*;

/// What the other tenant's things are called: no answer to the first may have any of it.
const FOREIGN: [&str; 4] = ["zebra", "stripes", "hooves", "mane"];

/// Method, path, body; the status for an operator, an administrator of the tenant, a reader of it, and an
/// administrator of another tenant.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    [u16; 4],
);

/// `ENDPOINT`'s path, then the one that is asked for.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("GET", "/v1/tenants", "/v1/tenants", "", [200, 200, 200, 200]),
    ("POST", "/v1/tenants", "/v1/tenants", r#"{"name":"new"}"#, [201, 403, 403, 403]),
    ("DELETE", "/v1/tenants/{tenant}", "/v1/tenants/acme?purge=true", "", [204, 403, 403, 403]),
    ("GET", "/v1/volumes", "/v1/volumes", "", [200, 200, 200, 200]),
    ("GET", "/v1/volumes", "/v1/volumes?tenant=acme", "", [200, 200, 200, 404]),
    ("POST", "/v1/volumes", "/v1/volumes", r#"{"tenant":"acme","name":"v","size_bytes":512}"#, [201, 201, 403, 404]),
    ("GET", "/v1/volumes/{tenant}/{volume}", "/v1/volumes/acme/db", "", [200, 200, 200, 404]),
    ("DELETE", "/v1/volumes/{tenant}/{volume}", "/v1/volumes/acme/db", "", [200, 200, 403, 404]),
    ("DELETE", "/v1/volumes/{tenant}/{volume}", "/v1/volumes/acme/db?discard_unsent=true", "", [200, 403, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/attach", "/v1/volumes/acme/db/attach", "", [200, 200, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/attach", "/v1/volumes/acme/db/attach", r#"{"via":"ublk"}"#, [200, 403, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/attach", "/v1/volumes/acme/db/attach", r#"{"force":true}"#, [200, 403, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/attach", "/v1/volumes/acme/db/attach", r#"{"device_mode":"0666"}"#, [200, 403, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/attach", "/v1/volumes/acme/db/attach", r#"{"discard_unsent":true}"#, [200, 403, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/attach", "/v1/volumes/acme/db/attach", r#"{"direct_reads":true}"#, [200, 403, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/detach", "/v1/volumes/acme/db/detach", "", [204, 204, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/resize", "/v1/volumes/acme/db/resize", r#"{"size_bytes":1024}"#, [200, 200, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/retain", "/v1/volumes/acme/db/retain", r#"{"retain_ms":5}"#, [200, 200, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/rescue", "/v1/volumes/acme/db/rescue", "", [200, 403, 403, 403]),
    ("POST", "/v1/volumes/{tenant}/{volume}/sync", "/v1/volumes/acme/db/sync", "", [204, 204, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/verify", "/v1/volumes/acme/db/verify", "", [200, 200, 403, 404]),
    ("GET", "/v1/volumes/{tenant}/{volume}/verify", "/v1/volumes/acme/db/verify", "", [200, 200, 200, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/warm", "/v1/volumes/acme/db/warm", "", [200, 200, 403, 404]),
    ("GET", "/v1/volumes/{tenant}/{volume}/warm", "/v1/volumes/acme/db/warm", "", [404, 404, 404, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/evict", "/v1/volumes/acme/db/evict", "", [200, 200, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/compact", "/v1/volumes/acme/db/compact", "", [200, 200, 403, 404]),
    ("GET", "/v1/volumes/{tenant}/{volume}/compact", "/v1/volumes/acme/db/compact", "", [404, 404, 404, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/flatten", "/v1/volumes/acme/db/flatten", "", [200, 200, 403, 404]),
    ("GET", "/v1/snapshots", "/v1/snapshots", "", [200, 200, 200, 200]),
    ("GET", "/v1/volumes/{tenant}/{volume}/snapshots", "/v1/volumes/acme/db/snapshots", "", [200, 200, 200, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/snapshots", "/v1/volumes/acme/db/snapshots", r#"{"name":"new"}"#, [201, 201, 403, 404]),
    ("GET", "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}", "/v1/volumes/acme/db/snapshots/s", "", [200, 200, 200, 404]),
    ("DELETE", "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}", "/v1/volumes/acme/db/snapshots/s", "", [204, 204, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}/clone", "/v1/volumes/acme/db/snapshots/s/clone", r#"{"name":"c"}"#, [201, 201, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}/rollback", "/v1/volumes/acme/db/snapshots/s/rollback", "", [200, 200, 403, 404]),
    ("GET", "/v1/trash", "/v1/trash", "", [200, 200, 200, 200]),
    ("GET", "/v1/trash", "/v1/trash?tenant=acme", "", [200, 200, 200, 404]),
    ("POST", "/v1/trash/restore", "/v1/trash/restore", r#"{"volume":"acme/old"}"#, [200, 200, 403, 404]),
    ("POST", "/v1/trash/restore", "/v1/trash/restore", r#"{"id":"f7a4f3a0-0000-4000-8000-000000000001"}"#, [200, 200, 403, 404]),
    ("POST", "/v1/trash/purge", "/v1/trash/purge", r#"{"all":true}"#, [200, 200, 403, 200]),
    ("POST", "/v1/trash/purge", "/v1/trash/purge", r#"{"all":true,"tenant":"acme"}"#, [200, 200, 403, 404]),
    ("GET", "/v1/status", "/v1/status", "", [200, 403, 403, 403]),
    ("GET", "/metrics", "/metrics", "", [200, 403, 403, 403]),
    ("GET", "/readyz", "/readyz", "", [200, 403, 403, 403]),
    ("GET", "/healthz", "/healthz", "", [200, 200, 200, 200]),
];

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

fn tenant(of: &str, role: Role) -> Caller {
    Caller::Tenant {
        tenant: name(of),
        role,
        token: format!("{of}.test"),
    }
}

fn operator() -> Caller {
    Caller::Operator {
        who: "test".to_owned(),
    }
}

/// Two tenants with a volume, a snapshot and something in the trash each.
async fn engine() -> Arc<dyn Engine> {
    let engine = FakeEngine::default();
    for (of, volume, old, snapshot) in [
        ("acme", "db", "old", "s"),
        ("zebra", "stripes", "mane", "hooves"),
    ] {
        let tenant: TenantName = name(of);
        engine.create_tenant(&tenant).await.unwrap();
        for volume in [volume, old] {
            let spec = format!(r#"{{"tenant":"{of}","name":"{volume}","size_bytes":512}}"#);
            let spec: VolumeSpec = serde_json::from_str(&spec).unwrap();
            engine.create_volume(spec).await.unwrap();
        }
        let snapshot = format!("{of}/{volume}@{snapshot}");
        engine.create_snapshot(&name(&snapshot)).await.unwrap();
        let old = VolumeRef {
            tenant,
            name: name::<VolumeName>(old),
        };
        engine.delete_volume(&old, false).await.unwrap();
        assert!(
            engine
                .list_trash(None)
                .await
                .unwrap()
                .iter()
                .any(|t| t.tenant == of)
        );
    }
    Arc::new(engine)
}

fn api(engine: &Arc<dyn Engine>, caller: Option<Caller>) -> Router {
    let access = Access::new(&quarry_config::Access::default()).unwrap();
    let routes = guarded(engine, &Arc::new(access));
    match caller {
        Some(caller) => routes.layer(axum::Extension(caller)),
        None => routes,
    }
}

/// Status, headers and body.
async fn ask(api: Router, method: &str, path: &str, body: &str) -> (u16, String) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .body(Body::from(body.to_owned()));
    let response = api.oneshot(request.unwrap()).await.unwrap();
    let (head, body) = response.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let body = String::from_utf8(body.to_vec()).unwrap();
    if head.status.is_client_error() {
        let problem: Problem = serde_json::from_str(&body).unwrap();
        assert!(!problem.remedy.is_empty(), "{body}");
    }
    (head.status.as_u16(), format!("{:?}\n{body}", head.headers))
}

#[tokio::test]
async fn every_endpoint_answers_every_role_as_the_table_says() {
    let roles = [
        Some(operator()),
        Some(tenant("acme", Role::Admin)),
        Some(tenant("acme", Role::Read)),
        Some(tenant("zebra", Role::Admin)),
        None,
    ];
    for endpoint in ENDPOINTS.iter() {
        let mut rows = TABLE
            .iter()
            .filter(|(method, of, ..)| (*method, *of) == (endpoint.method.as_str(), endpoint.path));
        let first = rows.next();
        let first = first.unwrap_or_else(|| panic!("{} {}", endpoint.method, endpoint.path));
        for (method, _, path, body, expected) in std::iter::once(first).chain(rows) {
            // Whoever is nobody gets nothing but what needs nobody.
            let nobody = if *path == "/healthz" { 200 } else { 403 };
            let expected = expected.iter().chain([&nobody]);
            for (caller, expected) in roles.iter().zip(expected) {
                let engine = engine().await;
                let (status, answer) = ask(api(&engine, caller.clone()), method, path, body).await;
                assert_eq!(
                    status, *expected,
                    "{method} {path} {body} {caller:?}: {answer}"
                );
                let is_acme = caller
                    .as_ref()
                    .is_some_and(|c| c.tenant() == Some(&name("acme")));
                if is_acme {
                    for foreign in FOREIGN {
                        assert!(
                            !answer.contains(foreign),
                            "{method} {path} {body}: {answer}"
                        );
                    }
                }
            }
        }
    }
    for (method, of, ..) in TABLE {
        let has = |e: &Endpoint| (e.method.as_str(), e.path) == (*method, *of);
        assert!(ENDPOINTS.iter().any(has), "{method} {of}");
    }
}

#[test]
fn endpoints_for_readers_only_look() {
    for endpoint in ENDPOINTS.iter() {
        let looks = endpoint.method == Method::GET;
        assert!(looks || endpoint.needs > Needs::Read, "{}", endpoint.path);
        assert_eq!(
            endpoint.needs == Needs::Nothing,
            endpoint.path == "/healthz"
        );
    }
}

/// What is told of another's thing is what is told of one that nobody has, but for its name.
#[tokio::test]
async fn other_tenants_things_are_as_those_that_are_not_there() {
    for (method, _, path, body, _) in TABLE {
        let of = |text: &str, tenant: &str, volume: &str, snapshot: &str| {
            text.replace("acme", tenant)
                .replace("/db", &format!("/{volume}"))
                .replace("/s/", &format!("/{snapshot}/"))
                .replace("/old", "/mane")
        };
        let theirs = (
            of(path, "zebra", "stripes", "hooves"),
            of(body, "zebra", "stripes", "hooves"),
        );
        let nobodys = (
            of(path, "nobod", "stripes", "hooves"),
            of(body, "nobod", "stripes", "hooves"),
        );
        if theirs == nobodys {
            continue;
        }
        let engine = engine().await;
        let caller = Some(tenant("acme", Role::Admin));
        let (status, answer) =
            ask(api(&engine, caller.clone()), method, &theirs.0, &theirs.1).await;
        let missing = ask(api(&engine, caller), method, &nobodys.0, &nobodys.1).await;
        assert!(
            status == 404 || status == 403,
            "{method} {}: {answer}",
            theirs.0
        );
        assert_eq!(missing, (status, answer.replace("zebra", "nobod")));
    }
}

#[tokio::test]
async fn trash_of_another_is_neither_restored_by_its_id_nor_purged() {
    let engine = engine().await;
    let theirs = engine.list_trash(Some(&name("zebra"))).await.unwrap();
    let caller = Some(tenant("acme", Role::Admin));
    let body = format!(r#"{{"id":"{}"}}"#, theirs[0].id);
    let (status, _) = ask(
        api(&engine, caller.clone()),
        "POST",
        "/v1/trash/restore",
        &body,
    )
    .await;
    assert_eq!(status, 404);
    let all = r#"{"all":true}"#;
    let (status, _) = ask(api(&engine, caller), "POST", "/v1/trash/purge", all).await;
    assert_eq!(status, 200);
    assert_eq!(engine.list_trash(None).await.unwrap(), theirs);
}

#[tokio::test]
async fn process_that_is_no_operators_is_refused_at_the_socket() {
    let engine = engine().await;
    let peer = |uid| Peer::Unix {
        uid,
        groups: vec![uid],
        pid: Some(1),
    };
    let own = rustix::process::geteuid().as_raw();
    for (uid, status) in [(own, 200), (own + 54_321, 403)] {
        let api = api(&engine, None).layer(axum::Extension(ConnectInfo(peer(uid))));
        let (got, answer) = ask(api, "GET", "/v1/volumes", "").await;
        assert_eq!(got, status, "{answer}");
    }
}
