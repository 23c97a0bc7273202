//! Reads of a server that says what a test tells it to.

use object_store::path::Path;
use object_store::signer::{Method, Signer as _};
use quarry_config::Secret;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::*;
use crate::store::stub::settings_at;
use crate::store::{S3Store, Store as _};

pub(in crate::store) const RANGE: Range<u64> = 16..16 + 512;

pub(in crate::store) const SHORT: Times = Times {
    head_max: Duration::from_millis(500),
    body_max: Duration::from_millis(200),
    rest: Duration::from_millis(300),
};

pub(in crate::store) fn answer(body: &str) -> String {
    format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Length: 512\r\nContent-Range: bytes 16-527/4096\r\n\r\n{body}"
    )
}

pub(in crate::store) fn body() -> String {
    "b".repeat(512)
}

/// A server that answers each request with the next of `answers`, on whatever connection it comes,
/// and tells of each request and of each connection (as an empty text). After an empty answer it
/// closes the connection.
pub(in crate::store) async fn server(
    answers: Vec<String>,
) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (heard, told) = mpsc::unbounded_channel();
    let answers = Arc::new(Mutex::new(answers.into_iter()));
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (heard, answers) = (heard.clone(), Arc::clone(&answers));
            let _ = heard.send(String::new());
            tokio::spawn(async move {
                let mut request = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    request.push(byte);
                    if !request.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let _ = heard.send(String::from_utf8(std::mem::take(&mut request)).unwrap());
                    let Some(answer) = answers.lock().next() else {
                        // Says nothing, and keeps the connection.
                        std::future::pending().await
                    };
                    if answer.is_empty() || stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, told)
}

pub(in crate::store) fn settings(address: &str) -> S3Settings {
    S3Settings {
        region: "r".to_owned(),
        keys: Some(("id".to_owned(), Secret::new("hunter2"))),
        ..settings_at(format!("http://{address}"))
    }
}

fn open(settings: &S3Settings) -> Result<PlainReads, NotPlain> {
    PlainReads::open(settings, s3::credentials(settings).unwrap(), SHORT)
}

pub(in crate::store) fn reads(address: &str) -> PlainReads {
    open(&settings(address)).unwrap()
}

async fn read(reads: &PlainReads) -> Result<Vec<Bytes>, PlainError> {
    reads.get_parts("t/key", RANGE, &[200, 312], 16).await
}

fn connections(told: &mut mpsc::UnboundedReceiver<String>) -> usize {
    let told = std::iter::from_fn(|| told.try_recv().ok());
    told.filter(String::is_empty).count()
}

#[tokio::test]
async fn parts_come_to_where_they_are_to_lie_one_after_another_on_a_connection() {
    let (address, mut told) = server(vec![answer(&body()); 3]).await;
    let reads = reads(&address);
    for _ in 0..3 {
        let parts = read(&reads).await.unwrap();
        assert_eq!(parts.concat(), body().as_bytes());
        for (part, len) in parts.iter().zip([200, 312]) {
            assert_eq!(part.len(), len);
            assert_eq!(part[16..].as_ptr() as usize % 4096, 0);
        }
    }
    assert_eq!(connections(&mut told), 1);
}

#[tokio::test]
async fn parts_cut_short_or_stalled_are_an_error_and_their_connection_not_used_again() {
    let cut = answer("bbb");
    let (address, mut told) = server(vec![cut, answer(&body())]).await;
    let reads = reads(&address);
    // The server goes on to wait for a request.
    let late = read(&reads).await;
    assert!(matches!(late, Err(PlainError::Late("body"))), "{late:?}");
    assert!(matches!(read(&reads).await, Err(PlainError::Resting)));
    // Time was lost: the rest is the longest at once.
    assert_eq!(reads.failures(), REST_DOUBLINGS_MAX + 1);
    assert!(reads.end_rest().unwrap() > SHORT.rest * 32);
    read(&reads).await.unwrap();
    assert_eq!(connections(&mut told), 2);
    assert_eq!(reads.failures(), 0);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reads = self::reads(&listener.local_addr().unwrap().to_string());
    let closing = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_u8().await.unwrap();
        stream.write_all(answer("bbb").as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        stream
    };
    let (broken, _stream) = tokio::join!(read(&reads), closing);
    assert!(matches!(broken, Err(PlainError::Body)), "{broken:?}");
}

#[tokio::test]
async fn what_goes_wrong_is_asked_for_by_the_library_and_nothing_else_for_a_while() {
    let by_library = answer(&body()).replace(
        "\r\n\r\n",
        "\r\nETag: \"x\"\r\nLast-Modified: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n",
    );
    let answers = vec![
        answer(&body()).replace("16-527", "15-526"),
        by_library.clone(),
        by_library,
    ];
    let (address, mut told) = server(answers).await;
    let store = S3Store::open(&settings(&address)).unwrap();
    for _ in 0..2 {
        let parts = store.get_parts("t/key", 16, &[200, 312], 16).await.unwrap();
        assert_eq!(parts.concat(), body().as_bytes());
    }
    let told = std::iter::from_fn(|| told.try_recv().ok());
    let requests: Vec<String> = told.filter(|request| !request.is_empty()).collect();
    let is_ours = |request: &&String| request.contains("\r\nUser-Agent: quarry\r\n");
    assert_eq!(requests.len(), 3);
    assert_eq!(requests.iter().filter(is_ours).count(), 1);
}

#[tokio::test]
async fn one_read_is_tried_when_a_rest_is_over_and_the_others_when_it_went_well() {
    let answers = vec![String::new(), answer(&body()), answer(&body())];
    let (address, mut told) = server(answers).await;
    let reads = reads(&address);
    read(&reads).await.unwrap_err();
    reads.end_rest();
    let (first, second) = tokio::join!(read(&reads), read(&reads));
    first.unwrap();
    assert!(matches!(second, Err(PlainError::Resting)));
    read(&reads).await.unwrap();
    let told = std::iter::from_fn(|| told.try_recv().ok());
    assert_eq!(told.filter(|request| !request.is_empty()).count(), 3);
}

#[tokio::test]
async fn object_that_is_shorter_or_not_there_is_no_failure_of_the_server() {
    let short = "HTTP/1.1 206 Partial Content\r\nContent-Length: 100\r\nContent-Range: bytes 16-115/116\r\n\r\n";
    let gone = answer("").replace("206 Partial Content", "404 Not Found");
    // The first fails, so that the next is the one that is tried.
    let answers = vec![
        "nonsense\r\n\r\n".to_owned(),
        format!("{short}{}", "b".repeat(100)),
        gone,
        answer(&body()),
    ];
    let (address, _told) = server(answers).await;
    let reads = reads(&address);
    read(&reads).await.unwrap_err();
    reads.end_rest();
    let cut = read(&reads).await;
    assert!(
        matches!(cut, Err(PlainError::Head(HeadError::Short))),
        "{cut:?}"
    );
    assert_eq!(reads.failures(), 0);
    let gone = read(&reads).await;
    assert!(
        matches!(gone, Err(PlainError::Head(HeadError::Status(404)))),
        "{gone:?}"
    );
    read(&reads).await.unwrap();
}

#[tokio::test]
async fn keys_that_the_server_refuses_are_asked_for_anew() {
    let refused = answer("").replace("206 Partial Content", "403 Forbidden");
    let answers = vec![answer(&body()), refused, answer(&body())];
    let (address, _told) = server(answers).await;
    let reads = reads(&address);
    read(&reads).await.unwrap();
    let signed = reads.signed("t/key").await.unwrap();
    read(&reads).await.unwrap_err();
    reads.end_rest();
    read(&reads).await.unwrap();
    assert!(!Arc::ptr_eq(&signed, &reads.signed("t/key").await.unwrap()));
}

#[test]
fn store_behind_tls_is_not_plain() {
    let settings = settings_at("https://127.0.0.1:1".to_owned());
    assert!(matches!(open(&settings), Err(NotPlain::Tls)));
}

#[tokio::test]
async fn address_of_an_object_is_the_librarys() {
    for path_style in [true, false] {
        for prefix in ["", "some/prefix"] {
            let settings = S3Settings {
                path_style,
                prefix: prefix.to_owned(),
                ..settings("store.example:80/")
            };
            let key = "t-1/v.2/chunk_3";
            let path = Path::from(format!("{prefix}/{key}"));
            let client = s3::client(&settings).unwrap();
            let url = client.signed_url(Method::GET, &path, Duration::from_secs(1));
            let mut url = url.await.unwrap();
            url.set_query(None);
            let address = open(&settings).unwrap().address(key);
            assert_eq!(Url::parse(&address).unwrap(), url);
        }
    }
}
