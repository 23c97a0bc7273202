//! The API over TCP, by TLS.
//!
//! Invariants:
//! - who has no token and asks for nothing costs a place for [`HEADER_TIME_MAX`] and a handshake at most;
//! - who does not take an answer, whether or not it needed a token, keeps its place for [`ANSWER_TIME_MAX`];
//! - plain HTTP is for loopback alone, and only where that is said.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower::Service as _;

use super::access::Peer;
use super::serve::{ListenError, stopping};
use crate::places::{Place, Places, holder};
use crate::tls::{HANDSHAKE_TIME_MAX, Tls, TlsFiles};

/// Connections at once; more wait to be accepted.
const CONNECTIONS_MAX: u32 = 256;
/// Of one address; more are closed. As many as a proxy needs, and never all.
const ADDRESS_CONNECTIONS_MAX: usize = 128;
/// How long a connection lives, and so a call by it at most.
const CONNECTION_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long a request's head may take, and how long a connection may rest between two.
const HEADER_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a client may take to take what it is sent. Each answer is one piece, and none is large: they are pages.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// Bytes of a request's head.
const HEADER_BYTES_MAX: usize = 16 << 10;
/// Lines of a request's head.
const HEADERS_MAX: usize = 64;
/// Wait after a failed `accept` (no file descriptors left, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the API listens on the network.
#[derive(Debug)]
pub struct Network {
    listener: TcpListener,
    /// None: plain HTTP.
    tls: Option<Arc<Tls>>,
}

impl Network {
    /// Listens where the configuration says, if it does.
    ///
    /// # Errors
    /// If the address is taken, or the certificate cannot be used.
    pub async fn bind(config: &quarry_config::Access) -> Result<Option<Self>, ListenError> {
        let Some(address) = config.listen else {
            return Ok(None);
        };
        let tls = certificate(config)?;
        let bound = TcpListener::bind(address).await;
        let listener = bound.map_err(|source| ListenError::Tcp {
            address,
            key: "access.listen",
            source,
        })?;
        Ok(Some(Self { listener, tls }))
    }

    /// That [`Self::bind`] finds the certificate that it needs.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn check(config: &quarry_config::Access) -> Result<(), ListenError> {
        config
            .listen
            .map_or(Ok(()), |_| certificate(config).map(drop))
    }

    /// The address, with its real port.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Serves `routes` until it is told to stop, and then until the calls under way have ended.
    pub(super) async fn serve(self, routes: Router, stopped: watch::Receiver<bool>) {
        let follow = self.tls.clone().map(|tls| tokio::spawn(tls.follow()));
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX as usize));
        let of_address = Places::default();
        loop {
            // The semaphore is never closed.
            let accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (place, self.listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                accepted = accepted => accepted,
                () = stopping(stopped.clone()) => break,
            };
            match (place, accepted) {
                (Ok(place), Ok((stream, from))) => {
                    let Some(of_address) =
                        of_address.take(&holder(from.ip()), ADDRESS_CONNECTIONS_MAX)
                    else {
                        tracing::debug!(%from, "a connection to the API is one too many of its address");
                        continue;
                    };
                    let (tls, routes, stopped) =
                        (self.tls.clone(), routes.clone(), stopped.clone());
                    tokio::spawn(connection(
                        stream,
                        from,
                        tls,
                        routes,
                        stopped,
                        (place, of_address),
                    ));
                }
                (_, Err(error)) => {
                    tracing::warn!(%error, "a connection to the API cannot be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
                (Err(_), _) => break,
            }
        }
        if let Some(follow) = follow {
            follow.abort();
        }
        drop(self.listener);
        drop(places.acquire_many(CONNECTIONS_MAX).await);
    }
}

fn certificate(config: &quarry_config::Access) -> Result<Option<Arc<Tls>>, ListenError> {
    let (Some(cert), Some(key)) = (&config.tls_cert, &config.tls_key) else {
        // The configuration was checked: loopback, and said.
        return Ok(None);
    };
    let files = TlsFiles {
        cert: cert.clone(),
        key: key.clone(),
        client_ca: None,
    };
    Ok(Some(Tls::load(files, &[b"http/1.1"])?))
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    tls: Option<Arc<Tls>>,
    routes: Router,
    stopped: watch::Receiver<bool>,
    _places: (OwnedSemaphorePermit, Place<IpAddr>),
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    let Some(tls) = tls else {
        return requests(stream, from, routes, stopped).await;
    };
    let handshake = TlsAcceptor::from(tls.config()).accept(stream);
    match timeout(HANDSHAKE_TIME_MAX, handshake).await {
        Ok(Ok(stream)) => requests(stream, from, routes, stopped).await,
        Ok(Err(error)) => tracing::debug!(%from, %error, "no TLS with a client of the API"),
        Err(_) => tracing::debug!(%from, "a client of the API takes too long to agree on TLS"),
    }
}

async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    from: SocketAddr,
    routes: Router,
    stopped: watch::Receiver<bool>,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request
            .extensions_mut()
            .insert(ConnectInfo(Peer::Tcp(from)));
        let mut routes = routes.clone();
        // A router is always ready.
        async move { routes.call(request.map(Body::new)).await }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(Taken::new(stream)), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping(stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = sleep(CONNECTION_LIFE) => return,
    };
    if let Err(error) = ended {
        tracing::debug!(%from, %error, "a connection to the API broke off");
    }
}

/// A connection whose client takes what it is sent, or loses it.
struct Taken<S> {
    stream: S,
    /// Set since something could not be sent at once, until all is.
    end: Option<Pin<Box<Sleep>>>,
}

impl<S> Taken<S> {
    const fn new(stream: S) -> Self {
        Self { stream, end: None }
    }

    /// An error once the client's time is over; registers to be woken then.
    fn in_time<T>(
        &mut self,
        cx: &mut Context<'_>,
        sent: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if sent.is_ready() {
            return sent;
        }
        let end = self
            .end
            .get_or_insert_with(|| Box::pin(sleep(ANSWER_TIME_MAX)));
        end.as_mut()
            .poll(cx)
            .map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Taken<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Taken<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let sent = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.in_time(cx, sent)
    }

    /// A client that takes a byte now and then has no more time for it: it begins anew when all is sent.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut self.stream).poll_flush(cx);
        if sent.is_ready() {
            self.end = None;
        }
        self.in_time(cx, sent)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.in_time(cx, sent)
    }
}

#[cfg(test)]
mod tests;
