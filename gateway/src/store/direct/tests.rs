//! Direct reads of a server that says what a test tells it to.

use std::time::Duration;

use super::*;
use crate::store::plain::tests::{RANGE, SHORT, answer, body, reads, server};
use crate::store::{FolderStore, LaneSettings};

fn way(address: &str, places: usize) -> (DirectLane, Lane) {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(FolderStore::open(dir.path(), true).unwrap());
    let limits = LaneSettings {
        requests_max: places,
        foreground_min: places - 1,
        ..LaneSettings::default()
    };
    let lane = Lane::new(store, &limits);
    let direct = DirectLane {
        lane: lane.clone(),
        reads: reads(address),
    };
    (direct, lane)
}

/// Receives a body as the reactor does, into memory.
async fn receive(body: Body) -> bool {
    let socket = body.socket();
    let mut bytes = vec![0; 512];
    let mut at = 0;
    while at < bytes.len() {
        socket.readable().await.unwrap();
        match socket.try_read(&mut bytes[at..]) {
            Ok(0) => break,
            Ok(more) => at += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    let whole = bytes == self::body().as_bytes();
    drop(socket);
    body.end(whole);
    whole
}

async fn read(way: &DirectLane) -> Result<(), PlainError> {
    let (opening, body) = way.ask("t/key", RANGE).await?;
    let (_, finished) = tokio::join!(receive(body), opening.finish());
    finished
}

#[tokio::test]
async fn reads_one_after_another_share_a_signed_request_and_a_connection() {
    let (address, mut told) = server(vec![answer(&body()); 3]).await;
    let (way, lane) = way(&address, 4);
    for _ in 0..3 {
        read(&way).await.unwrap();
    }
    assert_eq!(told.recv().await.unwrap(), "", "a connection");
    let first = told.recv().await.unwrap();
    assert!(
        first.starts_with("GET /bucket/some/prefix/t/key HTTP/1.1\r\n"),
        "{first}"
    );
    assert!(
        first.contains(&format!("\r\nHost: {address}\r\n")),
        "{first}"
    );
    assert!(
        first.ends_with("\r\nRange: bytes=16-527\r\n\r\n"),
        "{first}"
    );
    assert!(!first.contains("hunter2"));
    assert_eq!(told.recv().await.unwrap(), first, "the same connection");
    assert_eq!(told.recv().await.unwrap(), first);
    let stats = lane.stats().snapshot();
    assert_eq!(stats.attempts(Operation::GetRange, Outcome::Ok), 3);
    assert_eq!((stats.bytes_read, stats.in_flight), (3 * 512, 0));
}

#[tokio::test]
async fn connection_closed_while_idle_is_replaced_without_a_failure() {
    let answers = vec![answer(&body()), String::new(), answer(&body())];
    let (address, _told) = server(answers).await;
    let (way, _) = way(&address, 4);
    read(&way).await.unwrap();
    read(&way).await.unwrap();
}

#[tokio::test]
async fn answer_that_is_not_the_range_is_an_error_and_nothing_is_tried_for_a_moment() {
    let lies = [
        answer("").replace("206 Partial Content", "200 OK"),
        answer("").replace("206 Partial Content", "403 Forbidden"),
        answer("").replace("bytes 16-527", "bytes 0-511"),
        answer("").replace("Content-Length: 512", "Transfer-Encoding: chunked"),
        "\u{1}\u{2}nonsense\r\n\r\n".to_owned(),
        String::new(),
    ];
    let count = lies.len();
    let (address, _told) = server(lies.to_vec()).await;
    let (way, lane) = way(&address, 4);
    for _ in 0..count {
        assert!(!matches!(
            read(&way).await,
            Ok(()) | Err(PlainError::Resting)
        ));
        assert!(matches!(read(&way).await, Err(PlainError::Resting)));
        way.reads.end_rest();
    }
    assert_eq!(way.reads.failures() as usize, count);
    // The next says nothing at all.
    let late = read(&way).await;
    assert!(matches!(late, Err(PlainError::Late("answer"))), "{late:?}");
    assert_eq!(lane.stats().snapshot().in_flight, 0);
}

#[tokio::test]
async fn object_that_is_not_there_does_not_hold_up_others() {
    let gone = answer("").replace("206 Partial Content", "404 Not Found");
    let (address, _told) = server(vec![gone, answer(&body())]).await;
    let (way, lane) = way(&address, 4);
    let missing = read(&way).await;
    assert!(matches!(
        missing,
        Err(PlainError::Head(HeadError::Status(404)))
    ));
    read(&way).await.unwrap();
    let stats = lane.stats().snapshot();
    assert_eq!(stats.attempts(Operation::GetRange, Outcome::NotFound), 1);
}

#[tokio::test]
async fn rest_doubles_until_a_read_goes_well() {
    let answers = vec![String::new(), String::new(), answer(&body())];
    let (address, _told) = server(answers).await;
    let (way, _) = way(&address, 4);
    let rest = |way: &DirectLane| way.reads.end_rest().unwrap();
    read(&way).await.unwrap_err();
    assert!(rest(&way) <= SHORT.rest);
    read(&way).await.unwrap_err();
    assert!(rest(&way) > SHORT.rest);
    read(&way).await.unwrap();
    assert_eq!(way.reads.failures(), 0);
}

#[tokio::test]
async fn body_cut_short_is_an_error_and_its_connection_not_used_again() {
    let (address, mut told) = server(vec![answer("bbb"), answer(&body())]).await;
    let (way, _) = way(&address, 4);
    let (opening, body) = way.ask("t/key", RANGE).await.unwrap();
    // As the reactor does when it ends.
    body.end(false);
    assert!(matches!(opening.finish().await, Err(PlainError::Body)));
    tokio::time::sleep(SHORT.rest).await;
    read(&way).await.unwrap();
    let connections = std::iter::from_fn(|| told.try_recv().ok()).filter(String::is_empty);
    assert_eq!(connections.count(), 2);
}

#[tokio::test]
async fn body_longer_than_announced_spoils_the_connection() {
    let (address, mut told) = server(vec![answer(&(body() + "x")), answer(&body())]).await;
    let (way, _) = way(&address, 4);
    read(&way).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    read(&way).await.unwrap();
    let connections = std::iter::from_fn(|| told.try_recv().ok()).filter(String::is_empty);
    assert_eq!(connections.count(), 2);
}

#[tokio::test]
async fn body_that_stalls_is_broken_off_in_time() {
    let (address, _told) = server(vec![answer("bbb")]).await;
    let (way, lane) = way(&address, 4);
    let (opening, body) = way.ask("t/key", RANGE).await.unwrap();
    let (received, finished) = tokio::join!(receive(body), opening.finish());
    assert!(!received, "the receiving ended");
    assert!(matches!(finished, Err(PlainError::Late("body"))));
    let stats = lane.stats().snapshot();
    assert_eq!(stats.attempts(Operation::GetRange, Outcome::GivenUp), 1);
}

#[tokio::test]
async fn read_waits_for_a_place_in_the_lane() {
    let (address, mut told) = server(vec![answer(&body()); 3]).await;
    let (way, _) = way(&address, 2);
    let (one, first) = way.ask("t/key", RANGE).await.unwrap();
    let (two, second) = way.ask("t/key", RANGE).await.unwrap();
    while told.try_recv().is_ok() {}
    let third = timeout(Duration::from_millis(50), way.ask("t/key", RANGE)).await;
    assert!(third.is_err(), "both places are taken");
    assert!(told.try_recv().is_err(), "and the server was not asked");
    tokio::join!(receive(first), receive(second));
    one.finish().await.unwrap();
    two.finish().await.unwrap();
    read(&way).await.unwrap();
}

#[test]
fn store_that_is_a_folder_or_speaks_tls_is_unfit() {
    let store = Arc::new(crate::store::s3::tests::in_memory(""));
    let lane = Lane::new(store, &LaneSettings::default());
    let mut settings = StoreSettings {
        url: "file:///some/dir".to_owned(),
        endpoint: Some("https://127.0.0.1:1".to_owned()),
        ..StoreSettings::default()
    };
    let unfit = DirectLane::open(&settings, lane.clone());
    assert!(matches!(unfit, Err(Unfit::NotS3)));
    settings.url = "s3://bucket".to_owned();
    let unfit = DirectLane::open(&settings, lane);
    assert!(matches!(unfit, Err(Unfit::NotPlain(_))));
}
