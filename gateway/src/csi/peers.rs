//! The daemons of other hosts: what changes a volume that is attached is asked of the host that has it.

use std::sync::Arc;

use crate::control::{ApiError, ApiResult, Client, Kind};

/// What a host's name takes the place of.
const HOST: &str = "{host}";
/// What an address on a unix socket begins with.
const UNIX: &str = "unix://";

/// How they are reached.
#[derive(Clone)]
pub struct Peers {
    address: Arc<str>,
    token: Option<Arc<str>>,
    ca: Option<Arc<[u8]>>,
}

impl Peers {
    /// By `address`, in which `{host}` stands for a host's name; with the token and authorities of [`Client::network`].
    ///
    /// # Errors
    /// If nothing can be reached so.
    pub fn new(address: &str, token: Option<&str>, ca: Option<&[u8]>) -> ApiResult<Self> {
        let peers = Self {
            address: address.into(),
            token: token.map(Into::into),
            ca: ca.map(Into::into),
        };
        peers.client("host")?;
        Ok(peers)
    }

    /// A client of the host's daemon.
    ///
    /// # Errors
    /// If the host has a name that is none.
    pub(super) fn client(&self, host: &str) -> ApiResult<Client> {
        // It comes from an object of the store.
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        if host.is_empty() || host.starts_with('.') || !host.chars().all(is_name) {
            let message = format!("the host {host:?} has no name that an address could have");
            return Err(ApiError::new(Kind::Invalid, message, "give it another"));
        }
        let address = self.address.replace(HOST, host);
        match address.strip_prefix(UNIX) {
            Some(socket) => Client::new(socket),
            None => Client::network(&address, self.token.as_deref(), self.ca.as_deref()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_have_addresses_of_their_names_and_no_others() {
        let peers = Peers::new("https://{host}.storage.example:9443", None, None).unwrap();
        peers.client("node-3").unwrap();
        for wrong in ["", "a/b", "a@b", "../x", "a:1", "a b"] {
            assert!(peers.client(wrong).is_err(), "{wrong}");
        }
        Peers::new("unix:///run/{host}.sock", None, None).unwrap();
        assert!(Peers::new("http://{host}:9443", None, None).is_err());
        assert!(Peers::new("node-3", None, None).is_err());
    }
}
