//! For tests: an S3 server that answers every request the same.

use std::fmt::Write as _;
use std::sync::Arc;

use parking_lot::Mutex;
use quarry_config::{Secret, UploadCheck};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::{S3Settings, S3Store};

/// An HTTP answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    status: u16,
    headers: String,
    body: String,
    is_cut_off: bool,
}

impl Answer {
    pub(crate) fn new(status: u16, body: &str) -> Self {
        Self {
            status,
            headers: "etag: \"t\"\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\n".to_owned(),
            body: body.to_owned(),
            is_cut_off: false,
        }
    }

    pub(crate) fn error(status: u16, code: &str) -> Self {
        let body = format!("<Error>\n<Code>{code}</Code>\n<Message>in\n words</Message></Error>");
        Self::new(status, &body)
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        write!(self.headers, "{name}: {value}\r\n").unwrap();
        self
    }

    /// The connection ends one byte before the body does.
    pub(crate) fn cut_off(mut self) -> Self {
        self.is_cut_off = true;
        self
    }

    async fn serve(
        self,
        mut stream: TcpStream,
        heads: Arc<Mutex<Vec<String>>>,
    ) -> std::io::Result<()> {
        let mut request = vec![0; 65536];
        let mut len = 0;
        // Head and body come together or one after the other; all bodies here are short.
        loop {
            len += match stream.read(&mut request[len..]).await? {
                0 => return Ok(()),
                n => n,
            };
            let Some(head) = request[..len].windows(4).position(|w| w == b"\r\n\r\n") else {
                continue;
            };
            let text = String::from_utf8_lossy(&request[..head]).to_lowercase();
            let body: usize = text
                .split_once("content-length: ")
                .and_then(|(_, rest)| rest.lines().next()?.parse().ok())
                .unwrap_or_default();
            if len >= head + 4 + body {
                heads.lock().push(text);
                break;
            }
        }
        let len = self.body.len() + usize::from(self.is_cut_off);
        let Self {
            status,
            headers,
            body,
            ..
        } = self;
        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {len}\r\nconnection: close\r\n");
        stream
            .write_all(format!("{head}{headers}\r\n{body}").as_bytes())
            .await?;
        stream.shutdown().await
    }
}

/// A store whose server answers everything with `answer`.
pub(crate) async fn stub_store(answer: Answer) -> S3Store {
    S3Store::open(&stub_settings(answer).await).unwrap()
}

/// How to reach a server that answers everything with `answer`.
pub(crate) async fn stub_settings(answer: Answer) -> S3Settings {
    noting_settings(answer).await.0
}

/// The same, and where that server notes the requests' heads, in lower case.
pub(crate) async fn noting_settings(answer: Answer) -> (S3Settings, Arc<Mutex<Vec<String>>>) {
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let noted = Arc::clone(&heads);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer.clone().serve(stream, Arc::clone(&noted)));
        }
    });
    (settings_at(format!("http://{address}")), heads)
}

/// How to reach a server of a test.
pub(crate) fn settings_at(endpoint: String) -> S3Settings {
    S3Settings {
        bucket: "bucket".to_owned(),
        prefix: "some/prefix".to_owned(),
        endpoint: Some(endpoint),
        region: "us-east-1".to_owned(),
        keys: Some(("id".to_owned(), Secret::new("secret"))),
        session_token: None,
        source: None,
        path_style: true,
        upload_check: UploadCheck::Signature,
    }
}
