//! Direct reads of a plain-HTTP S3 server: a connection with the body still in it goes to whoever receives it into memory
//! that is not ours.
//!
//! Owns: the body's deadline, and what becomes of its connection. Does not own: asking ([`super::plain`]), the
//! receiving ([`crate::reactor::direct`]), and what is done when it fails: every failure is an error at once and no more,
//! for the ordinary way waits and tries again.
//!
//! A direct read has a place in the [`Lane`] like any other foreground read, from before it asks until
//! its body is there, and is counted there.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::net::{Shutdown, shutdown};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::lane::LanePlace;
use super::plain::{Answer, HeadError, NotPlain, PlainError, PlainReads, Signed, Socket, TIMES};
use super::{Lane, OpenError, Operation, Outcome, Place, StoreSettings, check_range, s3};
use crate::reactor::direct::Body;

/// Why there can be no direct reads of a store.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A folder.
    #[error("the store is no S3 server")]
    NotS3,
    /// The kernel would receive ciphertext, or a proxy stands between.
    #[error(transparent)]
    NotPlain(#[from] NotPlain),
    /// The kernel cannot.
    #[error("this kernel does not receive into registered pages ({0}; Linux 7.2 is the first)")]
    Kernel(#[source] io::Error),
    /// The settings are none.
    #[error(transparent)]
    Settings(#[from] OpenError),
}

/// The way to one server.
pub struct DirectLane {
    lane: Lane,
    reads: PlainReads,
}

impl DirectLane {
    /// The way to the store that `settings` name, with places in `lane`. Nothing is asked of the
    /// server yet.
    ///
    /// # Errors
    /// [`Unfit`]
    pub fn open(settings: &StoreSettings, lane: Lane) -> Result<Self, Unfit> {
        let Place::S3(settings) = settings.place()? else {
            return Err(Unfit::NotS3);
        };
        let reads = PlainReads::open(&settings, s3::credentials(&settings)?, TIMES)?;
        crate::reactor::direct::probe().map_err(Unfit::Kernel)?;
        Ok(Self { lane, reads })
    }

    /// Asks for the bytes `range` of an object. The body is to be received by whoever gets it; how
    /// that went is the [`Opening`]'s to wait for.
    ///
    /// # Errors
    /// [`PlainError`], without trying twice.
    pub async fn ask(
        &self,
        key: &str,
        range: Range<u64>,
    ) -> Result<(Opening<'_>, Body), PlainError> {
        if self.reads.is_resting() {
            return Err(PlainError::Resting);
        }
        check_range(key, &range)?;
        let signed = self.reads.signed(key).await?;
        let place = self.lane.place(Operation::GetRange).await;
        // Those before it in the line may have failed.
        self.reads.awake()?;
        let (stream, lives) = match self.ask_watched(&signed, &range).await {
            Ok((stream, lives)) => (Arc::new(stream), lives),
            Err(error) => {
                place.end(outcome(&error));
                return Err(error);
            }
        };
        let (body, heard) = Body::new(Arc::clone(&stream));
        let opening = Opening {
            reads: &self.reads,
            place,
            stream: Cut(Some(stream)),
            heard,
            len: range.end - range.start,
            lives,
        };
        Ok((opening, body))
    }

    /// Asks; the connection is the runtime's, and this is whether it lives on.
    async fn ask_watched(
        &self,
        signed: &Signed,
        range: &Range<u64>,
    ) -> Result<(TcpStream, bool), PlainError> {
        let Answer { socket, lives } = self.reads.ask(signed, range).await?;
        match socket.into_watched() {
            Ok(stream) => Ok((stream, lives)),
            Err(error) => Err(self.reads.failed(HeadError::Io(error).into()).await),
        }
    }
}

/// A failure as the lane counts it.
const fn outcome(error: &PlainError) -> Outcome {
    match error {
        PlainError::Head(HeadError::Status(404)) => Outcome::NotFound,
        PlainError::Head(HeadError::Status(401 | 403)) => Outcome::Denied,
        _ => Outcome::Unavailable,
    }
}

/// A direct read whose body is being received; dropped, it is broken off.
pub struct Opening<'a> {
    reads: &'a PlainReads,
    place: LanePlace<'a>,
    stream: Cut,
    heard: oneshot::Receiver<bool>,
    len: u64,
    lives: bool,
}

impl Opening<'_> {
    /// Waits until the body was received, or breaks it off when its time is over.
    ///
    /// # Errors
    /// If it was not received whole.
    pub async fn finish(mut self) -> Result<(), PlainError> {
        let limit = self.reads.times.body(self.len);
        let (heard, outcome, error) = match timeout(limit, &mut self.heard).await {
            Ok(heard) => (heard, Outcome::Unavailable, PlainError::Body),
            Err(_) => {
                self.lives = false;
                self.stream.cut();
                // Who receives hears of that, and says so; or was done in this moment.
                let heard = (&mut self.heard).await;
                (heard, Outcome::GivenUp, PlainError::Late("body"))
            }
        };
        if heard != Ok(true) {
            self.place.end(outcome);
            return Err(self.reads.failed(error).await);
        }
        self.place
            .received(usize::try_from(self.len).unwrap_or(usize::MAX));
        let stream = self.stream.into_inner();
        let kept = stream.filter(|_| self.lives).map(Socket::Watched);
        self.reads.took(kept);
        Ok(())
    }
}

/// A connection that is shut down with this handle: whoever else has it is not left waiting.
struct Cut(Option<Arc<TcpStream>>);

impl Cut {
    fn cut(&self) {
        if let Some(stream) = &self.0 {
            // Not connected any more: then nobody waits on it.
            let _ = shutdown(&**stream, Shutdown::Both);
        }
    }

    /// The connection, if nobody else has it.
    fn into_inner(mut self) -> Option<TcpStream> {
        Arc::into_inner(self.0.take()?)
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.cut();
    }
}

impl fmt::Debug for DirectLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectLane")
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
