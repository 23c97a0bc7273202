//! The servers: who may connect, how many, for how long, and how they end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Sleep, sleep, timeout};

use super::access::{Access, Peer};
use super::endpoints::{guarded, health_routes};
use super::network::Network;
use super::socket::ControlSocket;
use super::{Engine, SocketError};
use crate::tls::TlsError;

/// Connections to the unix socket at once; more wait to be accepted.
const CONTROL_CONNECTIONS_MAX: usize = 256;
/// Connections to the TCP listener at once; more wait to be accepted.
const HEALTH_CONNECTIONS_MAX: usize = 64;
/// How long a TCP connection lives: scrapes take milliseconds, and whoever dawdles frees its place.
const HEALTH_CONNECTION_LIFE: Duration = Duration::from_secs(60);
/// A unix connection lives as long as its calls: a sync may wait out an outage.
const CONTROL_CONNECTION_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long calls under way may go on after the order to stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// What the control plane listens on. Bound first, so that a daemon that cannot be reached does
/// not touch anything.
#[derive(Debug)]
pub struct Listeners {
    control: ControlSocket,
    health: Option<TcpListener>,
    network: Option<Network>,
}

/// Why the control plane cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The unix socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The TCP address.
    #[error("cannot listen on {address}: {source}; choose another address with {key}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The flag or the key that says it.
        key: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The certificate for TCP.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Listeners {
    /// Listens on the unix socket at `socket`, and on `listen` for health and metrics.
    ///
    /// # Errors
    /// If either is taken or cannot be made.
    pub async fn bind(
        socket: &std::path::Path,
        listen: Option<SocketAddr>,
    ) -> Result<Self, ListenError> {
        let control = ControlSocket::bind(socket)?;
        let health = match listen {
            None => None,
            Some(address) => {
                let bound = TcpListener::bind(address).await;
                Some(bound.map_err(|source| ListenError::Tcp {
                    address,
                    key: "--listen",
                    source,
                })?)
            }
        };
        Ok(Self {
            control,
            health,
            network: None,
        })
    }

    /// Listens for the API on the network too.
    #[must_use]
    pub fn with_network(self, network: Option<Network>) -> Self {
        Self { network, ..self }
    }

    /// The TCP address that was bound, with its real port.
    #[must_use]
    pub fn health_address(&self) -> Option<SocketAddr> {
        self.health
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
    }
}

/// Serves until `shutdown` is done, then lets calls under way finish for [`SHUTDOWN_GRACE`]. The
/// socket's path is given up on return.
///
/// # Errors
/// If a listener breaks.
pub async fn serve(
    engine: Arc<dyn Engine>,
    access: Arc<Access>,
    listeners: Listeners,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let Listeners {
        mut control,
        health,
        network,
    } = listeners;
    let (stop, stopped) = watch::channel(false);

    let unix = Limited::new(
        control.take_listener()?,
        CONTROL_CONNECTIONS_MAX,
        CONTROL_CONNECTION_LIFE,
    );
    let routes = guarded(&engine, &access);
    let network = {
        let (routes, stopped) = (routes.clone(), stopped.clone());
        async move {
            if let Some(network) = network {
                network.serve(routes, stopped).await;
            }
            Ok(())
        }
    };
    let unix = axum::serve(unix, routes.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(stopping(stopped.clone()));
    let tcp_stopped = stopped.clone();
    let tcp = async move {
        match health {
            None => Ok(()),
            Some(listener) => {
                let listener =
                    Limited::new(listener, HEALTH_CONNECTIONS_MAX, HEALTH_CONNECTION_LIFE);
                let routes = health_routes(engine);
                axum::serve(
                    listener,
                    routes.into_make_service_with_connect_info::<Peer>(),
                )
                .with_graceful_shutdown(stopping(tcp_stopped))
                .await
            }
        }
    };
    let servers = async { tokio::try_join!(unix.into_future(), tcp, network).map(|_| ()) };
    tokio::pin!(servers);
    tokio::select! {
        ended = &mut servers => return ended,
        () = shutdown => {}
    }
    stop.send_replace(true);
    match timeout(SHUTDOWN_GRACE, servers).await {
        Ok(ended) => ended,
        Err(_) => {
            tracing::warn!("control calls were still under way at shutdown and were cut off");
            Ok(())
        }
    }
}

/// Done when the servers are to stop.
pub(super) async fn stopping(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop too.
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// A listener with so many connections at most, each with a life at most so long.
pub(super) struct Limited<L> {
    inner: L,
    places: Arc<Semaphore>,
    life: Duration,
}

impl<L> Limited<L> {
    fn new(inner: L, connections_max: usize, life: Duration) -> Self {
        Self {
            inner,
            places: Arc::new(Semaphore::new(connections_max)),
            life,
        }
    }
}

impl<L> Listener for Limited<L>
where
    L: Listener,
    L::Io: Unpin,
{
    type Io = LimitedIo<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        // The semaphore is never closed; without a permit the connection would only go uncounted.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (inner, address) = self.inner.accept().await;
        (
            LimitedIo {
                inner,
                end: Box::pin(sleep(self.life)),
                _place: place,
            },
            address,
        )
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}

/// A connection that ends when its time is over, and gives its place back.
pub(super) struct LimitedIo<I> {
    inner: I,
    end: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl<I> LimitedIo<I> {
    pub fn inner(&self) -> &I {
        &self.inner
    }

    /// An error once the time is over; registers to be woken then.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for LimitedIo<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for LimitedIo<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn connection_past_its_life_is_ended_and_its_place_given_back() {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let mut listener = Limited::new(tcp, 1, Duration::from_millis(20));
        let _first = TcpStream::connect(address).await.unwrap();
        let _second = TcpStream::connect(address).await.unwrap();
        let (mut io, _) = Listener::accept(&mut listener).await;
        assert!(
            timeout(Duration::from_millis(50), Listener::accept(&mut listener))
                .await
                .is_err()
        );
        assert_eq!(
            io.read(&mut [0; 1]).await.unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        drop(io);
        timeout(Duration::from_secs(5), Listener::accept(&mut listener))
            .await
            .unwrap();
    }
}
