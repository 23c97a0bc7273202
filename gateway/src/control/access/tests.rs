//! Every endpoint by every role, held to a table of its own: an endpoint that is not in it fails the test.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::ConnectInfo;
use axum::http::{Method, Request};
use quarry_objfmt::{TenantName, VolumeName};
use tower::ServiceExt as _;

use super::super::endpoints::{ENDPOINTS, Endpoint, guarded};
use super::super::fake::{FakeEngine, access_in};
use super::super::token::{TokenMade, TokenRole, TokenSpec};
use super::super::{Engine, Problem, VolumeRef, VolumeSpec};
use super::*;
use crate::engine::now_ms;

/// What the other tenant's things are called: no answer to the first may have any of it.
const FOREIGN: [&str; 4] = ["zebra", "stripes", "hooves", "mane"];

/// What nobody in particular gets too.
const OPEN: [&str; 3] = ["/", "/healthz", "/v1/openapi.json"];

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
    ("GET", "/v1/tenants/{tenant}", "/v1/tenants/acme", "", [200, 200, 200, 404]),
    ("PATCH", "/v1/tenants/{tenant}", "/v1/tenants/acme", r#"{"volumes_max":5}"#, [200, 403, 403, 403]),
    ("POST", "/v1/tenants/{tenant}/suspend", "/v1/tenants/acme/suspend", r#"{"how":"stall"}"#, [200, 403, 403, 403]),
    ("POST", "/v1/tenants/{tenant}/resume", "/v1/tenants/acme/resume", "", [200, 403, 403, 403]),
    ("DELETE", "/v1/tenants/{tenant}", "/v1/tenants/acme?purge=true", "", [204, 403, 403, 403]),
    ("GET", "/v1/volumes", "/v1/volumes", "", [200, 200, 200, 200]),
    ("GET", "/v1/volumes", "/v1/volumes?tenant=acme", "", [200, 200, 200, 404]),
    ("POST", "/v1/tenants", "/v1/tenants", r#"{"name":"acme"}"#, [200, 403, 403, 403]),
    ("POST", "/v1/volumes", "/v1/volumes", r#"{"tenant":"acme","name":"db","size_bytes":512}"#, [200, 200, 403, 404]),
    ("POST", "/v1/volumes", "/v1/volumes", r#"{"tenant":"acme","name":"db","size_bytes":1024}"#, [409, 409, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/snapshots", "/v1/volumes/acme/db/snapshots", r#"{"name":"s"}"#, [200, 200, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/snapshots/{snapshot}/clone", "/v1/volumes/acme/db/snapshots/s/clone", r#"{"name":"db"}"#, [409, 409, 403, 404]),
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
    ("PUT", "/v1/volumes/{tenant}/{volume}/rates", "/v1/volumes/acme/db/rates", r#"{"iops":5}"#, [200, 200, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/rekey", "/v1/volumes/acme/db/rekey", "", [400, 400, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/rekey", "/v1/volumes/acme/db/rekey", r#"{"key":"k"}"#, [200, 403, 403, 404]),
    ("POST", "/v1/volumes", "/v1/volumes", r#"{"tenant":"acme","name":"w","size_bytes":512,"key":"k"}"#, [201, 403, 403, 404]),
    ("POST", "/v1/volumes/{tenant}/{volume}/release", "/v1/volumes/acme/db/release", r#"{"from":"f7a4f3a0-0000-4000-8000-000000000001"}"#, [200, 403, 403, 403]),
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
    ("GET", "/v1/tokens", "/v1/tokens", "", [200, 403, 403, 403]),
    ("POST", "/v1/tokens", "/v1/tokens", r#"{"tenant":"acme","role":"read"}"#, [201, 403, 403, 403]),
    ("DELETE", "/v1/tokens/{token}", "/v1/tokens/acme.none", "", [404, 403, 403, 403]),
    ("GET", "/v1/openapi.json", "/v1/openapi.json", "", [200, 200, 200, 200]),
    ("POST", "/v1/doctor", "/v1/doctor", "", [200, 403, 403, 403]),
    ("GET", "/v1/status", "/v1/status", "", [200, 403, 403, 403]),
    ("GET", "/v1/activity", "/v1/activity", "", [200, 200, 200, 200]),
    ("GET", "/", "/", "", [200, 200, 200, 200]),
    ("GET", "/metrics", "/metrics", "", [200, 403, 403, 403]),
    ("GET", "/readyz", "/readyz", "", [200, 403, 403, 403]),
    ("GET", "/healthz", "/healthz", "", [200, 200, 200, 200]),
];

/// Whose token each column's caller has.
const CALLERS: [Option<(&str, TokenRole)>; 4] = [
    None,
    Some(("acme", TokenRole::Admin)),
    Some(("acme", TokenRole::Read)),
    Some(("zebra", TokenRole::Admin)),
];

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

/// Two tenants with a volume, a snapshot and something in the trash each.
async fn engine() -> Arc<dyn Engine> {
    let engine = FakeEngine::default();
    for (of, volume, old, snapshot) in [
        ("acme", "db", "old", "s"),
        ("zebra", "stripes", "mane", "hooves"),
    ] {
        let tenant: TenantName = name(of);
        engine.create_tenant(tenant.clone().into()).await.unwrap();
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

/// The API, and the tokens that its callers have.
struct Site {
    dir: tempfile::TempDir,
    engine: Arc<dyn Engine>,
    access: Arc<Access>,
}

impl Site {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            access: Arc::new(access_in(dir.path())),
            engine: engine().await,
            dir,
        }
    }

    /// A new token: of a tenant's role, or an operator's.
    async fn token(&self, of: Option<(&str, TokenRole)>) -> TokenMade {
        let spec = TokenSpec {
            tenant: of.map(|(tenant, _)| name(tenant)),
            role: of.map_or(TokenRole::Operator, |(_, role)| role),
            expires_ms: None,
            note: String::new(),
        };
        let tokens = self.access.tokens().unwrap();
        tokens.create(&spec, None).await.unwrap()
    }

    /// Asks as somebody on the network does: status, and headers and body.
    async fn ask(
        &self,
        token: Option<&str>,
        method: &str,
        path: &str,
        body: &str,
    ) -> (u16, String) {
        let peer = Peer::Tcp("127.0.0.1:999".parse().unwrap());
        let api = guarded(&self.engine, &self.access).layer(axum::Extension(ConnectInfo(peer)));
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let (head, body) = api.oneshot(request).await.unwrap().into_parts();
        let body = to_bytes(body, 1 << 20).await.unwrap();
        let body = String::from_utf8(body.to_vec()).unwrap();
        if head.status.is_client_error() {
            let problem: Problem = serde_json::from_str(&body).unwrap();
            assert!(!problem.remedy.is_empty(), "{body}");
        }
        (head.status.as_u16(), format!("{:?}\n{body}", head.headers))
    }

    /// None, one that is none, one that was revoked, and one that has ended: operators' ones.
    async fn useless_tokens(&self) -> Vec<Option<String>> {
        let tokens = self.access.tokens().unwrap();
        let revoked = self.token(None).await;
        tokens.revoke(&revoked.info.id).await.unwrap();
        let soon = TokenSpec {
            tenant: None,
            role: TokenRole::Operator,
            expires_ms: Some(now_ms() + 20),
            note: String::new(),
        };
        let ended = tokens.create(&soon, None).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
        vec![
            None,
            Some("qry_x".to_owned()),
            Some(revoked.token),
            Some(ended.token),
        ]
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("audit.jsonl")).unwrap()
    }
}

#[tokio::test]
async fn every_endpoint_answers_every_role_as_the_table_says() {
    for endpoint in ENDPOINTS.iter() {
        let mut rows = TABLE
            .iter()
            .filter(|(method, of, ..)| (*method, *of) == (endpoint.method.as_str(), endpoint.path));
        let first = rows.next();
        let first = first.unwrap_or_else(|| panic!("{} {}", endpoint.method, endpoint.path));
        for (method, _, path, body, expected) in std::iter::once(first).chain(rows) {
            for (caller, expected) in CALLERS.iter().zip(expected) {
                // Each call changes something.
                let site = Site::new().await;
                let token = site.token(*caller).await.token;
                let (status, answer) = site.ask(Some(&token), method, path, body).await;
                assert_eq!(
                    status, *expected,
                    "{method} {path} {body} {caller:?}: {answer}"
                );
                if caller.is_some_and(|(of, _)| of == "acme") {
                    for foreign in FOREIGN {
                        assert!(
                            !answer.contains(foreign),
                            "{method} {path} {body}: {answer}"
                        );
                    }
                }
            }
            // Whoever is nobody gets nothing but what needs nobody.
            let open = OPEN.contains(path);
            let nobody = if open { 200 } else { 401 };
            let site = Site::new().await;
            for token in site.useless_tokens().await {
                let (status, answer) = site.ask(token.as_deref(), method, path, body).await;
                assert_eq!(status, nobody, "{method} {path} {token:?}: {answer}");
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
            OPEN.contains(&endpoint.path)
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
        let site = Site::new().await;
        let token = site.token(CALLERS[1]).await.token;
        let ask = async |(path, body): &(String, String)| {
            site.ask(Some(&token), method, path, body).await
        };
        let (status, answer) = ask(&theirs).await;
        let missing = ask(&nobodys).await;
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
    let site = Site::new().await;
    let token = site.token(CALLERS[1]).await.token;
    let ask = async |path: &str, body: &str| site.ask(Some(&token), "POST", path, body).await.0;
    let theirs = site.engine.list_trash(Some(&name("zebra"))).await.unwrap();
    let restore = format!(r#"{{"id":"{}"}}"#, theirs[0].id);
    assert_eq!(ask("/v1/trash/restore", &restore).await, 404);
    assert_eq!(ask("/v1/trash/purge", r#"{"all":true}"#).await, 200);
    assert_eq!(site.engine.list_trash(None).await.unwrap(), theirs);
}

#[tokio::test]
async fn process_that_is_no_operators_is_refused_at_the_socket() {
    let site = Site::new().await;
    let peer = |uid| Peer::Unix {
        uid,
        groups: vec![uid],
        pid: Some(1),
    };
    let own = rustix::process::geteuid().as_raw();
    for (uid, status) in [(own, 200), (own + 54_321, 403)] {
        let layer = axum::Extension(ConnectInfo(peer(uid)));
        let api = guarded(&site.engine, &site.access).layer(layer);
        let request = Request::builder().uri("/v1/volumes").body(Body::empty());
        let response = api.oneshot(request.unwrap()).await.unwrap();
        assert_eq!(response.status(), status);
    }
}

#[tokio::test]
async fn change_is_in_the_log_before_and_after_with_who_and_what_and_no_secret() {
    let site = Site::new().await;
    let admin = site.token(CALLERS[1]).await;
    let operator = site.token(None).await;
    let volume = r#"{"tenant":"acme","name":"fresh","size_bytes":512}"#;
    site.ask(Some(&admin.token), "POST", "/v1/volumes", volume)
        .await;
    site.ask(Some(&admin.token), "GET", "/v1/volumes", "").await;
    site.ask(Some(&admin.token), "GET", "/v1/volumes/zebra/stripes", "")
        .await;
    site.ask(Some(&admin.token), "POST", "/v1/volumes/acme/db/rescue", "")
        .await;
    site.ask(None, "DELETE", "/v1/tenants/acme?purge=true", "")
        .await;
    let made = r#"{"tenant":"acme","role":"read"}"#;
    let (_, made) = site
        .ask(Some(&operator.token), "POST", "/v1/tokens", made)
        .await;
    let made: TokenMade = serde_json::from_str(made.split_once('\n').unwrap().1).unwrap();
    let text = site.log();
    for token in [&admin, &operator, &made] {
        let secret = token.token.rsplit_once('_').unwrap().1;
        assert!(!text.contains(secret));
    }
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let told: Vec<_> = lines
        .iter()
        .map(|line| {
            let word = |key: &str| line[key].as_str().unwrap_or("-").to_owned();
            (
                word("event"),
                word("method") + " " + &word("target"),
                word("outcome"),
            )
        })
        .collect();
    let expected = [
        ("begin", "POST /v1/volumes", "-"),
        ("end", "POST /v1/volumes", "done"),
        ("denied", "GET /v1/volumes/zebra/stripes", "not_found"),
        ("denied", "POST /v1/volumes/acme/db/rescue", "denied"),
        ("denied", "DELETE /v1/tenants/acme?purge=true", "denied"),
        ("begin", "POST /v1/tokens", "-"),
        ("end", "POST /v1/tokens", "done"),
    ];
    let expected = expected.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned()));
    assert_eq!(told, expected);
    let first = &lines[0];
    assert_eq!(first["caller"], format!("token {}", admin.info.id));
    assert_eq!(first["names"]["name"], "fresh");
    assert_eq!(first["options"], serde_json::json!({"size_bytes": 512}));
    assert_eq!(
        (&first["tenant"], &first["from"]),
        (&"acme".into(), &"127.0.0.1:999".into())
    );
    assert_eq!(
        (&first["call"], &lines[1]["status"]),
        (&lines[1]["call"], &201.into())
    );
    assert!(lines[4]["caller"].is_null() && lines[1]["duration_ms"].is_u64());
}

#[tokio::test]
async fn look_at_anothers_things_is_in_the_log_however_it_is_asked_for_and_none_at_ones_own() {
    let site = Site::new().await;
    let token = site.token(CALLERS[1]).await.token;
    let behind = format!("/v1/volumes?after={}&tenant=zebra", "a".repeat(600));
    for (path, status) in [
        ("/v1/volumes?ten%61nt=zebra", 404),
        (&*behind, 404),
        ("/v1/volumes/%61cme/db", 200),
        ("/v1/volumes?tenant=%61cme", 200),
    ] {
        let (found, answer) = site.ask(Some(&token), "GET", path, "").await;
        assert_eq!(found, status, "{path}: {answer}");
    }
    let lines: Vec<serde_json::Value> = site
        .log()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let targets: Vec<_> = lines
        .iter()
        .map(|l| l["target"].as_str().unwrap())
        .collect();
    assert_eq!(targets, ["/v1/volumes?ten%61nt=zebra", &behind[..512]]);
    assert!(lines.iter().all(|line| line["event"] == "denied"));
}

#[tokio::test]
async fn clients_read_lists_of_many_pages_and_refuse_to_make_twice() {
    let engine = engine().await;
    for n in 0..2500 {
        let spec = format!(r#"{{"tenant":"acme","name":"v{n}","size_bytes":512}}"#);
        let spec: VolumeSpec = serde_json::from_str(&spec).unwrap();
        engine.create_volume(spec).await.unwrap();
    }
    let daemon = super::super::fake::FakeDaemon::start(engine).await;
    let client = daemon.client();
    let acme: TenantName = name("acme");
    let all = client.list_volumes(Some(&acme)).await.unwrap();
    assert_eq!((all.volumes.len(), all.next), (2501, None));
    let names: std::collections::BTreeSet<_> = all.volumes.iter().map(|v| &v.name).collect();
    assert_eq!(names.len(), 2501);
    assert_eq!(client.list_volumes(None).await.unwrap().volumes.len(), 2502);
    assert_eq!(client.list_trash(None).await.unwrap().trash.len(), 2);
    let again = client
        .create_snapshot(&name("acme/db@s"))
        .await
        .unwrap_err();
    assert_eq!(again.kind, Kind::Exists, "{again}");
    let again = client
        .create_tenant(&acme.clone().into())
        .await
        .unwrap_err();
    assert_eq!(again.kind, Kind::Exists, "{again}");
    daemon.stop().await;
}
