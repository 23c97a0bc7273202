//! The handshake: from a fresh socket to an export that both sides agree on.
//!
//! Runs in tokio. Reads exactly what the handshake is made of and not a byte more, so that the
//! socket can be handed on as it is. Invariant: what a client can make this side hold or do is
//! bounded by [`OPTION_BYTES_MAX`] and [`OPTIONS_MAX`], the time by the caller.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::{self, Put, option, reply};
use super::{Export, ExportDirectory};

/// Most options in one handshake.
const OPTIONS_MAX: usize = 64;

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum NegotiationError {
    /// The socket failed, or the client went.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("the client does not speak NBD as it should: {0}")]
    Protocol(&'static str),
}

/// What a handshake agreed on.
#[derive(Clone)]
pub struct Negotiated {
    /// The export.
    pub export: Export,
    /// What replies look like.
    pub replies: Replies,
}

/// What replies look like, and what can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Replies {
    /// Whether reads get structured replies.
    pub structured: bool,
    /// Whether the context `base:allocation` was set, without which there is no block status.
    pub status: bool,
}

impl std::fmt::Debug for Negotiated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Negotiated")
            .field("volume", &self.export.volume)
            .field("replies", &self.replies)
            .finish_non_exhaustive()
    }
}

/// What a handshake leads to.
pub(super) enum Agreement {
    /// An export.
    Export(Negotiated),
    /// The client ended it in good order.
    Ended,
    /// TLS, and then another one.
    Tls,
}

/// What is said of TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Terms {
    /// There is none here.
    Plain,
    /// It comes before everything else.
    TlsFirst,
    /// It is there.
    Secured,
}

/// Negotiates without TLS; `None` if the client ended it in good order.
///
/// # Errors
/// See [`NegotiationError`].
pub async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    directory: &dyn ExportDirectory,
) -> Result<Option<Negotiated>, NegotiationError> {
    let zeroes = greet(stream).await?;
    match haggle(stream, directory, zeroes, Terms::Plain).await? {
        Agreement::Export(negotiated) => Ok(Some(negotiated)),
        Agreement::Ended | Agreement::Tls => Ok(None),
    }
}

/// Both sides' first words; whether the client wants zeroes behind an export's answer.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
) -> Result<bool, NegotiationError> {
    let mut greeting = Vec::with_capacity(18);
    greeting.put_u64(wire::GREETING_MAGIC);
    greeting.put_u64(wire::OPTION_MAGIC);
    greeting.put_u16(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
    stream.write_all(&greeting).await?;

    let flags = stream.read_u32().await?;
    let known = u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(NegotiationError::Protocol(
            "it set client flags that were not offered",
        ));
    }
    Ok(flags & u32::from(wire::FLAG_NO_ZEROES) == 0)
}

/// The client's options, until they lead to something.
pub(super) async fn haggle<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    directory: &dyn ExportDirectory,
    zeroes: bool,
    terms: Terms,
) -> Result<Agreement, NegotiationError> {
    let mut agreed = Agreed::default();
    let mut payload = Vec::new();
    let mut out = Vec::new();
    for _ in 0..OPTIONS_MAX {
        if stream.read_u64().await? != wire::OPTION_MAGIC {
            return Err(NegotiationError::Protocol(
                "an option does not start with the magic",
            ));
        }
        let code = stream.read_u32().await?;
        let len = stream.read_u32().await?;
        if len > wire::OPTION_BYTES_MAX {
            return Err(NegotiationError::Protocol("an option is too long"));
        }
        payload.resize(usize::try_from(len).unwrap_or(0), 0);
        stream.read_exact(&mut payload).await?;

        out.clear();
        let step = match before_tls(code, &payload, terms, &mut out) {
            Some(step) => step,
            None => answer(code, &payload, directory, &mut agreed, zeroes, &mut out)?,
        };
        stream.write_all(&out).await?;
        stream.flush().await?;
        match step {
            Step::Next => {}
            Step::End => return Ok(Agreement::Ended),
            Step::Tls => return Ok(Agreement::Tls),
            Step::Go(export, replies) => {
                return Ok(Agreement::Export(Negotiated { export, replies }));
            }
        }
    }
    Err(NegotiationError::Protocol("it sends options without end"))
}

/// What was agreed on so far.
#[derive(Default)]
struct Agreed {
    structured: bool,
    /// The export that the context `base:allocation` was set for: it holds for no other.
    status_of: Option<String>,
}

impl Agreed {
    fn replies(&self, export: &str) -> Replies {
        Replies {
            structured: self.structured,
            status: self.status_of.as_deref() == Some(export),
        }
    }
}

/// What follows an option.
enum Step {
    Next,
    End,
    Tls,
    Go(Export, Replies),
}

/// What is answered for the sake of TLS alone; `None`: the option is to be answered for itself.
fn before_tls(code: u32, payload: &[u8], terms: Terms, out: &mut Vec<u8>) -> Option<Step> {
    let mut reply = |reply: u32, text: &[u8]| wire::put_option_reply(out, code, reply, text);
    match (terms, code) {
        (Terms::TlsFirst, option::STARTTLS) if payload.is_empty() => {
            reply(reply::ACK, &[]);
            return Some(Step::Tls);
        }
        (Terms::TlsFirst | Terms::Secured, option::STARTTLS) => {
            reply(
                reply::ERR_INVALID,
                b"TLS is there, or this option has no data",
            );
        }
        (Terms::Plain, option::STARTTLS) => {
            reply(reply::ERR_POLICY, b"TLS is not served on this socket");
        }
        (Terms::TlsFirst, option::ABORT) | (Terms::Plain | Terms::Secured, _) => return None,
        // The protocol has no answer for this but to hang up.
        (Terms::TlsFirst, option::EXPORT_NAME) => return Some(Step::End),
        (Terms::TlsFirst, _) => reply(reply::ERR_TLS_REQD, b"TLS comes first"),
    }
    Some(Step::Next)
}

fn answer(
    code: u32,
    payload: &[u8],
    directory: &dyn ExportDirectory,
    agreed: &mut Agreed,
    zeroes: bool,
    out: &mut Vec<u8>,
) -> Result<Step, NegotiationError> {
    match code {
        option::EXPORT_NAME => {
            let name = std::str::from_utf8(payload).unwrap_or_default();
            let Some(export) = directory.lookup(name) else {
                // The protocol has no answer for this but to hang up.
                return Ok(Step::End);
            };
            out.put_u64(export.geometry.size.bytes());
            out.put_u16(wire::export_flags(&export.geometry, agreed.structured));
            if zeroes {
                out.resize(out.len() + wire::EXPORT_NAME_ZEROES, 0);
            }
            return Ok(Step::Go(export, agreed.replies(name)));
        }
        option::ABORT => {
            wire::put_option_reply(out, code, reply::ACK, &[]);
            return Ok(Step::End);
        }
        option::LIST if payload.is_empty() => {
            for name in directory.list() {
                let mut entry = Vec::with_capacity(4 + name.len());
                let len = u32::try_from(name.len())
                    .map_err(|_| NegotiationError::Protocol("a name of 4 GiB"))?;
                entry.put_u32(len);
                entry.extend_from_slice(name.as_bytes());
                wire::put_option_reply(out, code, reply::SERVER, &entry);
            }
            wire::put_option_reply(out, code, reply::ACK, &[]);
        }
        option::INFO | option::GO => {
            let Some(request) = wire::InfoRequest::decode(payload) else {
                wire::put_option_reply(out, code, reply::ERR_INVALID, b"malformed request");
                return Ok(Step::Next);
            };
            let Some(export) = directory.lookup(request.name) else {
                wire::put_option_reply(
                    out,
                    code,
                    reply::ERR_UNKNOWN,
                    b"no volume of this name is attached by NBD",
                );
                return Ok(Step::Next);
            };
            let mut size = Vec::with_capacity(12);
            size.put_u16(wire::info::EXPORT);
            size.put_u64(export.geometry.size.bytes());
            size.put_u16(wire::export_flags(&export.geometry, agreed.structured));
            wire::put_option_reply(out, code, reply::INFO, &size);
            let mut blocks = Vec::with_capacity(14);
            blocks.put_u16(wire::info::BLOCK_SIZE);
            blocks.put_u32(export.geometry.sector_size);
            blocks.put_u32(wire::PREFERRED_BLOCK.max(export.geometry.sector_size));
            blocks.put_u32(wire::PAYLOAD_BYTES_MAX);
            wire::put_option_reply(out, code, reply::INFO, &blocks);
            wire::put_option_reply(out, code, reply::ACK, &[]);
            if code == option::GO {
                return Ok(Step::Go(export, agreed.replies(request.name)));
            }
        }
        option::STRUCTURED_REPLY if payload.is_empty() => {
            agreed.structured = true;
            wire::put_option_reply(out, code, reply::ACK, &[]);
        }
        option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
            if code == option::SET_META_CONTEXT {
                agreed.status_of = None;
            }
            match wire::decode_meta_query(payload) {
                Some(_) if !agreed.structured => {
                    wire::put_option_reply(
                        out,
                        code,
                        reply::ERR_INVALID,
                        b"structured replies come first",
                    );
                }
                Some(query) if directory.lookup(query.name).is_none() => {
                    wire::put_option_reply(
                        out,
                        code,
                        reply::ERR_UNKNOWN,
                        b"no volume of this name is attached by NBD",
                    );
                }
                Some(query) => {
                    // To list, all of a kind may be asked for, or all that there are.
                    let listed = code == option::LIST_META_CONTEXT
                        && (query.queries == 0 || query.namespace);
                    if query.allocation || listed {
                        let mut context = Vec::with_capacity(4 + wire::allocation::NAME.len());
                        context.put_u32(wire::allocation::ID);
                        context.extend_from_slice(wire::allocation::NAME.as_bytes());
                        wire::put_option_reply(out, code, reply::META_CONTEXT, &context);
                    }
                    if query.allocation && code == option::SET_META_CONTEXT {
                        agreed.status_of = Some(query.name.to_owned());
                    }
                    wire::put_option_reply(out, code, reply::ACK, &[]);
                }
                None => wire::put_option_reply(out, code, reply::ERR_INVALID, b"malformed query"),
            }
        }
        option::LIST | option::STRUCTURED_REPLY => {
            wire::put_option_reply(out, code, reply::ERR_INVALID, b"this option has no data");
        }
        _ => wire::put_option_reply(out, code, reply::ERR_UNSUP, &[]),
    }
    Ok(Step::Next)
}
