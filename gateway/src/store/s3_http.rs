//! HTTP clients for the S3 library, as it makes them itself, but that none goes where an answer sends it.
//!
//! A tenant names its server. One that sends us elsewhere would have the daemon ask, or change, what only the daemon
//! reaches, and with the headers of a store's request.
//!
//! Owns: what a client of the library is made with. Does not own: the options, which are
//! [`builder`](super::s3::builder)'s; one that is set there has to be read here.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use object_store::client::{HttpClient, HttpConnector};
use object_store::{ClientConfigKey, ClientOptions};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use uuid::Uuid;

/// Makes the clients, also those that ask for the machine's role.
#[derive(Debug)]
pub(super) struct Straight;

impl HttpConnector for Straight {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let may_be_plain = options.get_config_value(&ClientConfigKey::AllowHttp);
        let mut client = reqwest::Client::builder()
            .redirect(Policy::none())
            .user_agent(concat!("quarry/", env!("CARGO_PKG_VERSION")))
            .https_only(may_be_plain.as_deref() != Some("true"))
            .http1_only()
            // What is unpacked on its way has another length than the object.
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate()
            .dns_resolver(Arc::new(Shuffled));
        if let Some(headers) = options.get_default_headers() {
            client = client.default_headers(headers.clone());
        }
        if let Some(time) = duration(options, &ClientConfigKey::Timeout)? {
            client = client.timeout(time);
        }
        if let Some(time) = duration(options, &ClientConfigKey::ConnectTimeout)? {
            client = client.connect_timeout(time);
        }
        if let Some(time) = duration(options, &ClientConfigKey::ReadTimeout)? {
            client = client.read_timeout(time);
        }
        if let Some(time) = duration(options, &ClientConfigKey::PoolIdleTimeout)? {
            client = client.pool_idle_timeout(time);
        }
        Ok(HttpClient::new(client.build().map_err(failed)?))
    }
}

/// An option that is a time; the library gives it as text.
fn duration(
    options: &ClientOptions,
    key: &ClientConfigKey,
) -> object_store::Result<Option<Duration>> {
    let text = options.get_config_value(key);
    let parsed = text.map(|text| humantime::parse_duration(&text));
    parsed.transpose().map_err(failed)
}

fn failed(error: impl Error + Send + Sync + 'static) -> object_store::Error {
    object_store::Error::Generic {
        store: "HTTP",
        source: Box::new(error),
    }
}

/// Spreads connections over a server's addresses.
struct Shuffled;

impl Resolve for Shuffled {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let mut all: Vec<SocketAddr> = found.collect();
            all.sort_by_cached_key(|_| Uuid::new_v4());
            let all: Addrs = Box::new(all.into_iter());
            Ok::<_, Box<dyn Error + Send + Sync>>(all)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::install_crypto;

    #[test]
    fn times_of_the_options_are_the_clients() {
        let options = ClientOptions::new()
            .with_timeout(Duration::from_secs(300))
            .with_read_timeout(Duration::from_millis(1500));
        let time = |key| duration(&options, &key).unwrap();
        assert_eq!(
            time(ClientConfigKey::Timeout),
            Some(Duration::from_secs(300))
        );
        assert_eq!(
            time(ClientConfigKey::ReadTimeout),
            Some(Duration::from_millis(1500))
        );
        assert_eq!(time(ClientConfigKey::PoolIdleTimeout), None);
        install_crypto();
        Straight.connect(&options).unwrap();
    }

    #[tokio::test]
    async fn name_is_resolved() {
        let found = Shuffled.resolve("localhost".parse().unwrap()).await;
        let Ok(mut all) = found else {
            panic!("localhost is not found")
        };
        assert!(all.all(|address| address.ip().is_loopback()));
    }
}
