//! The API by TLS, as its client and as strangers meet it.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::super::fake::{FakeDaemon, FakeEngine};
use super::super::{Client, Kind, TokenRole, TokenSpec};
use super::*;
use crate::tls::testing::Authority;

async fn daemon(dir: &std::path::Path) -> (FakeDaemon, String) {
    let files = Authority::new(dir).server();
    let config = quarry_config::Access {
        listen: Some("127.0.0.1:0".parse().unwrap()),
        tls_cert: Some(files.cert),
        tls_key: Some(files.key),
        ..quarry_config::Access::default()
    };
    let network = Network::bind(&config).await.unwrap().unwrap();
    let url = format!("https://localhost:{}", network.address().unwrap().port());
    let daemon = FakeDaemon::start_on(Arc::new(FakeEngine::default()), Some(network)).await;
    (daemon, url)
}

#[tokio::test]
async fn client_with_a_token_reaches_its_tenant_and_without_one_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (daemon, url) = daemon(dir.path()).await;
    let operator = daemon.client();
    let tenant = quarry_objfmt::TenantName::new("acme").unwrap();
    operator
        .create_tenant(&tenant.clone().into())
        .await
        .unwrap();
    daemon.keep_tenant(&tenant).await;
    let spec = TokenSpec {
        tenant: Some(tenant),
        role: TokenRole::Admin,
        expires_ms: None,
        note: String::new(),
    };
    let made = operator.create_token(&spec).await.unwrap();
    let ca = std::fs::read(dir.path().join("ca.pem")).unwrap();
    let client = |token: Option<&str>| Client::network(&url, token, Some(&ca)).unwrap();

    let acme = client(Some(&made.token));
    assert_eq!(acme.list_tenants().await.unwrap().tenants.len(), 1);
    assert_eq!(acme.status().await.unwrap_err().kind, Kind::Denied);
    let error = client(None).list_tenants().await.unwrap_err();
    assert_eq!(
        (error.kind, &*error.message),
        (Kind::Denied, "a token is needed")
    );
    operator.revoke_token(&made.info.id).await.unwrap();
    let error = acme.list_tenants().await.unwrap_err();
    assert!(error.message.contains("no longer"), "{error}");

    let stranger = Client::network(&url, None, None).unwrap();
    let error = stranger.list_tenants().await.unwrap_err();
    assert!(error.remedy.contains("--ca"), "{error}");
    daemon.stop().await;
    let error = acme.list_tenants().await.unwrap_err();
    assert!(error.remedy.contains("access.listen"), "{error}");
}

#[tokio::test]
async fn plain_http_and_heads_without_end_get_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (daemon, url) = daemon(dir.path()).await;
    let address = url.trim_start_matches("https://");
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    drop(plain.read_to_end(&mut answer).await);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");

    let ca = std::fs::read(dir.path().join("ca.pem")).unwrap();
    let http = reqwest::Client::builder()
        .tls_certs_only(reqwest::Certificate::from_pem_bundle(&ca).unwrap())
        .build()
        .unwrap();
    let get = |length: usize| {
        let request = http.get(format!("{url}/healthz"));
        request.header("x-long", "x".repeat(length)).send()
    };
    assert_eq!(get(10).await.unwrap().status(), 200);
    assert!(
        !get(2 * HEADER_BYTES_MAX)
            .await
            .is_ok_and(|r| r.status() == 200)
    );
    daemon.stop().await;
}

/// A connection with next to no buffer, to what answers with so many `Z`s.
fn small(
    answer: usize,
) -> (
    tokio::io::DuplexStream,
    tokio::task::JoinHandle<()>,
    watch::Sender<bool>,
) {
    let (client, server) = tokio::io::duplex(1024);
    let (stop, stopped) = watch::channel(false);
    let get = axum::routing::get(move || async move { "Z".repeat(answer) });
    let routes = Router::new().route("/", get);
    let from = "127.0.0.1:999".parse().unwrap();
    (
        client,
        tokio::spawn(requests(server, from, routes, stopped)),
        stop,
    )
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test(start_paused = true)]
async fn client_that_does_not_take_its_answer_loses_its_place() {
    for takes in [0, 256] {
        let (mut client, served, _stop) = small(1 << 20);
        client.write_all(GET).await.unwrap();
        let begun = tokio::time::Instant::now();
        let mut taken = vec![0; takes];
        while !served.is_finished() {
            sleep(ANSWER_TIME_MAX / 4).await;
            assert!(begun.elapsed() < 2 * ANSWER_TIME_MAX, "{takes}");
            if takes > 0 {
                client.read_exact(&mut taken).await.unwrap();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn client_that_takes_each_answer_in_time_is_served_for_longer_than_that() {
    let (mut client, served, _stop) = small(1 << 16);
    for _ in 0..4 {
        client.write_all(GET).await.unwrap();
        sleep(ANSWER_TIME_MAX / 2).await;
        let (mut seen, mut some) = (0, [0; 4096]);
        while seen < 1 << 16 {
            let bytes = client.read(&mut some).await.unwrap();
            assert!(bytes > 0, "it is closed");
            seen += some[..bytes].iter().filter(|b| **b == b'Z').count();
        }
    }
    assert!(!served.is_finished());
}

#[test]
fn url_that_would_show_the_token_is_refused() {
    for url in [
        "http://example.com",
        "ftp://localhost",
        "nowhere",
        "https://h/path",
        "https://me@h",
    ] {
        let error = Client::network(url, Some("t"), None).err().unwrap();
        assert_eq!(error.kind, Kind::Invalid, "{url}");
    }
    for url in [
        "http://127.0.0.1:1",
        "http://[::1]:1",
        "https://example.com:9443",
    ] {
        assert!(Client::network(url, Some("t"), None).is_ok(), "{url}");
    }
}
