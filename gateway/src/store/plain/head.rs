//! The head of an HTTP answer, read without taking a byte of the body, and believed in nothing.

use std::io;
use std::ops::Range;

use bytes::BufMut as _;

use super::Socket;

/// The longest head that is read.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// Most fields in it.
const FIELDS_MAX: usize = 64;

/// How much is looked at where the head's length cannot be guessed from the last one's: so much of
/// the body, at most, is looked at as well.
const STEP_BYTES: usize = 64;

const END: &[u8] = b"\r\n\r\n";

/// Why an answer is not one whose body can be received as it is.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The server closed it, before or inside the head.
    #[error("the server closed the connection")]
    Closed {
        /// Whether nothing of an answer had come.
        at_once: bool,
    },
    /// No head, or not within the limits.
    #[error("the answer is no HTTP")]
    Garbage,
    /// Another status than 206.
    #[error("the server answers with status {0}")]
    Status(u16),
    /// The object ends before the range does, and its end is the body.
    #[error("the object is shorter")]
    Short,
    /// The body is not the bytes asked for, one by one.
    #[error("the server's answer has {0}")]
    Field(&'static str),
}

/// Reads a head and leaves what follows it in the socket. `guess` is the length of the last one.
pub(super) async fn read(socket: &mut Socket, guess: usize) -> Result<Vec<u8>, HeadError> {
    let mut head = Vec::new();
    loop {
        let before = head.len();
        let step = guess.saturating_sub(before).max(STEP_BYTES);
        let step = step.min(HEAD_BYTES_MAX - before);
        if step == 0 {
            return Err(HeadError::Garbage);
        }
        head.resize(before + step, 0);
        let seen = socket.peek(&mut head[before..]).await?;
        if seen == 0 {
            let at_once = before == 0;
            return Err(HeadError::Closed { at_once });
        }
        head.truncate(before + seen);
        // It may have begun in what was taken before.
        let from = before.saturating_sub(END.len() - 1);
        let mut ends = head[from..].windows(END.len());
        let end = ends.position(|w| w == END).map(|at| from + at + END.len());
        head.truncate(end.unwrap_or(head.len()));
        take(socket, &mut head[before..]).await?;
        if end.is_some() {
            return Ok(head);
        }
    }
}

/// Takes bytes that were seen to be there.
async fn take(socket: &mut Socket, mut into: &mut [u8]) -> Result<(), HeadError> {
    while into.has_remaining_mut() {
        if socket.receive(&mut into).await? == 0 {
            return Err(HeadError::Closed { at_once: false });
        }
    }
    Ok(())
}

/// Whether `head` announces exactly the bytes `range` of an object, as they are and with a length.
/// Answers whether the connection lives on after them.
pub(super) fn check(head: &[u8], range: &Range<u64>) -> Result<bool, HeadError> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut answer = httparse::Response::new(&mut fields);
    match answer.parse(head) {
        Ok(httparse::Status::Complete(len)) if len == head.len() => {}
        _ => return Err(HeadError::Garbage),
    }
    if answer.version != Some(1) {
        return Err(HeadError::Garbage);
    }
    match answer.code {
        Some(206) => {}
        Some(code) => return Err(HeadError::Status(code)),
        None => return Err(HeadError::Garbage),
    }
    let (mut length, mut place, mut lives) = (None, None, true);
    for field in answer.headers.iter() {
        let is = |name| field.name.eq_ignore_ascii_case(name);
        if is("content-length") && length.replace(field.value).is_some() {
            return Err(HeadError::Field("two lengths"));
        }
        if is("content-range") && place.replace(field.value).is_some() {
            return Err(HeadError::Field("two ranges"));
        }
        if is("transfer-encoding") || is("content-encoding") {
            return Err(HeadError::Field("an encoding"));
        }
        let mut words = field.value.split(|byte| *byte == b',');
        if is("connection") && words.any(|w| w.trim_ascii().eq_ignore_ascii_case(b"close")) {
            lives = false;
        }
    }
    let place = place.and_then(place_of);
    let (part, whole) = place.ok_or(HeadError::Field("no range"))?;
    if length.and_then(number) != part.end.checked_sub(part.start) {
        return Err(HeadError::Field("another length than its range"));
    }
    match part {
        part if part == *range && whole >= range.end => Ok(lives),
        part if part == (range.start..whole) && whole < range.end => Err(HeadError::Short),
        _ => Err(HeadError::Field("another range than was asked for")),
    }
}

/// What a `Content-Range` says: which bytes, of an object of which size.
fn place_of(value: &[u8]) -> Option<(Range<u64>, u64)> {
    let value = std::str::from_utf8(value).ok()?.strip_prefix("bytes ")?;
    let (part, whole) = value.split_once('/')?;
    let (first, last) = part.split_once('-')?;
    let first = number(first.as_bytes())?;
    let last = number(last.as_bytes())?;
    Some((first..last.checked_add(1)?, number(whole.as_bytes())?))
}

fn number(digits: &[u8]) -> Option<u64> {
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    plain.then(|| std::str::from_utf8(digits).ok()?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const GOOD: &str = "HTTP/1.1 206 Partial Content\r\nContent-Length: 512\r\n\
        Content-Range: bytes 16-527/4096\r\nETag: \"x\"\r\n\r\n";

    fn checked(head: &str) -> Result<bool, HeadError> {
        check(head.as_bytes(), &(16..528))
    }

    #[test]
    fn head_of_the_range_asked_for_is_taken() {
        assert!(checked(GOOD).unwrap());
        let last = GOOD.replace("ETag: \"x\"", "connection: Keep-Alive, CLOSE");
        assert!(!checked(&last).unwrap(), "the connection ends with it");
        assert!(checked(&GOOD.replace("/4096", "/528")).unwrap());
    }

    #[test]
    fn head_of_anything_else_is_refused() {
        let with = |from: &str, to: &str| {
            assert!(GOOD.contains(from), "{from}");
            GOOD.replace(from, to)
        };
        let bad = [
            with("206 Partial Content", "200 OK"),
            with("206 Partial Content", "403 Forbidden"),
            with("206 Partial Content", "100 Continue"),
            with("HTTP/1.1", "HTTP/1.0"),
            with("HTTP/1.1", "SSH-2.0"),
            with("16-527/4096", "15-526/4096"),
            with("16-527/4096", "16-528/4096"),
            with("16-527/4096", "16-527/*"),
            with("16-527/4096", "16-527/527"),
            with("16-527/4096", "+16-527/4096"),
            with("16-527/4096", "16-18446744073709551615/4096"),
            with("bytes 16", "sectors 16"),
            with("Content-Range: bytes 16-527/4096\r\n", ""),
            with("Content-Length: 512", "Content-Length: 513"),
            with(
                "Content-Length: 512",
                "Content-Length: 512\r\nContent-Length: 512",
            ),
            with("Content-Length: 512", "Content-Length: 512, 512"),
            with("Content-Length: 512\r\n", ""),
            with("ETag: \"x\"", "Transfer-Encoding: chunked"),
            with("ETag: \"x\"", "Content-Encoding: gzip"),
            with("ETag: \"x\"", "Content-Range: bytes 16-527/4096"),
            with("ETag: \"x\"", "no field"),
            with("\r\n\r\n", "\r\n"),
            format!("{GOOD}x"),
            String::new(),
        ];
        for head in bad {
            assert!(checked(&head).is_err(), "{head}");
        }
        let many = with("ETag: \"x\"", &"A: b\r\n".repeat(FIELDS_MAX));
        assert!(checked(&many).is_err());
    }

    /// A connection whose other end sends `pieces`, each on its own, and closes.
    async fn sending(pieces: Vec<Vec<u8>>) -> Socket {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut there, _) = listener.accept().await.unwrap();
            there.set_nodelay(true).unwrap();
            for piece in pieces {
                there.write_all(&piece).await.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        Socket::Watched(TcpStream::connect(address).await.unwrap())
    }

    #[tokio::test]
    async fn head_cut_anywhere_is_read_and_the_body_left() {
        let whole = format!("{GOOD}body\r\n\r\n");
        let whole = whole.as_bytes();
        for cut in (1..whole.len())
            .step_by(7)
            .chain([GOOD.len() - 1, GOOD.len(), GOOD.len() - 3])
        {
            for guess in [0, GOOD.len() - 5, GOOD.len(), GOOD.len() + 100] {
                let pieces = vec![whole[..cut].to_vec(), whole[cut..].to_vec()];
                let mut stream = sending(pieces).await;
                let head = read(&mut stream, guess).await.unwrap();
                assert_eq!(head, GOOD.as_bytes(), "cut at {cut}, guess {guess}");
                let mut rest = Vec::new();
                stream
                    .into_watched()
                    .unwrap()
                    .read_to_end(&mut rest)
                    .await
                    .unwrap();
                assert_eq!(rest, b"body\r\n\r\n", "cut at {cut}, guess {guess}");
            }
        }
    }

    #[tokio::test]
    async fn head_that_ends_early_or_never_is_an_error() {
        let closed = read(&mut sending(Vec::new()).await, 0).await;
        assert!(matches!(closed, Err(HeadError::Closed { at_once: true })));
        let half = GOOD.as_bytes()[..40].to_vec();
        let closed = read(&mut sending(vec![half]).await, 300).await;
        assert!(matches!(closed, Err(HeadError::Closed { at_once: false })));
        let mut endless = sending(vec![vec![b'a'; HEAD_BYTES_MAX + 1]]).await;
        assert!(matches!(
            read(&mut endless, 0).await,
            Err(HeadError::Garbage)
        ));
    }
}
