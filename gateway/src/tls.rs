//! Certificates for who comes by TCP: read from files, and read again when the files change.
//!
//! Owns rustls' settings for servers. Does not own sockets, nor who may do what.
//!
//! **Invariant:** what was read and is sound is used until something else that is sound was read: a
//! certificate that is half written, or does not fit its key, is told of and not used.

pub(crate) mod expiry;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};

/// Between two looks at whether the files have changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// How long a client may take to agree on a connection's encryption.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {reason}; it must hold {what} in PEM", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What is wanted of it.
        what: &'static str,
    },
    /// They do not fit each other.
    #[error("{} and its key cannot be used: {source}", path.display())]
    Pair {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// The files.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFiles {
    /// The server's certificate, and those up to its root.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The roots of clients' certificates, which are then wanted of all.
    pub client_ca: Option<PathBuf>,
}

/// What tells whether a file is another: its number, length and times.
type Stamp = Vec<Option<(u64, u64, i64, i64)>>;

/// A server's certificates.
pub struct Tls {
    files: TlsFiles,
    protocols: Vec<Vec<u8>>,
    current: Mutex<(Arc<ServerConfig>, Stamp)>,
}

impl Tls {
    /// Those in `files`, for a server that speaks `protocols` (as ALPN has them; none: any).
    ///
    /// # Errors
    /// If they cannot be used.
    pub fn load(files: TlsFiles, protocols: &[&[u8]]) -> Result<Arc<Self>, TlsError> {
        let protocols: Vec<_> = protocols.iter().map(|p| p.to_vec()).collect();
        // Before reading: what changes meanwhile is read again.
        let stamp = files.stamp();
        let config = Arc::new(files.read(&protocols)?);
        Ok(Arc::new(Self {
            files,
            protocols,
            current: Mutex::new((config, stamp)),
        }))
    }

    /// What new connections are to use.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.lock().0)
    }

    /// Reads the files again whenever they change, for ever.
    pub async fn follow(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let tls = Arc::clone(&self);
            if let Err(error) = tokio::task::spawn_blocking(move || tls.look()).await {
                tracing::error!(%error, "certificates are not looked at");
            }
        }
    }

    /// Reads the files again if they have changed.
    fn look(&self) {
        let stamp = self.files.stamp();
        if self.current.lock().1 == stamp {
            return;
        }
        match self.files.read(&self.protocols) {
            Ok(config) => {
                *self.current.lock() = (Arc::new(config), stamp);
                tracing::info!(cert = %self.files.cert.display(), "a changed certificate is in use");
            }
            Err(error) => {
                // Once a change.
                self.current.lock().1 = stamp;
                tracing::error!(%error, "a changed certificate is not used; the one before it is");
            }
        }
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tls").field(&self.files).finish()
    }
}

impl TlsFiles {
    fn stamp(&self) -> Stamp {
        let all = [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()];
        let of = |path: &PathBuf| {
            let found = fs::metadata(path).ok()?;
            Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
        };
        all.into_iter().map(|path| path.and_then(of)).collect()
    }

    fn read(&self, protocols: &[Vec<u8>]) -> Result<ServerConfig, TlsError> {
        crate::store::install_crypto();
        let certs = certificates(&self.cert)?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|error| unreadable(&self.key, "a private key", &error))?;
        let builder = ServerConfig::builder();
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => builder.with_client_cert_verifier(verifier(path)?),
        };
        let config = builder.with_single_cert(certs, key);
        let mut config = config.map_err(|source| TlsError::Pair {
            path: self.cert.clone(),
            source,
        })?;
        config.alpn_protocols = protocols.to_vec();
        Ok(config)
    }
}

fn verifier(path: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    const WHAT: &str = "the certificates of clients' authorities";
    let mut roots = RootCertStore::empty();
    for cert in certificates(path)? {
        roots
            .add(cert)
            .map_err(|error| unreadable(path, WHAT, &error))?;
    }
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
    verifier.map_err(|error| unreadable(path, WHAT, &error))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    const WHAT: &str = "certificates";
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unreadable(path, WHAT, &error))?;
    if found.is_empty() {
        return Err(unreadable(
            path,
            WHAT,
            &io::Error::other("there is none in it"),
        ));
    }
    Ok(found)
}

fn unreadable(path: &Path, what: &'static str, error: &dyn std::fmt::Display) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        reason: error.to_string(),
        what,
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Certificates made for a test.

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;

    /// An authority in a folder.
    pub(crate) struct Authority {
        dir: PathBuf,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Authority {
        /// One whose own certificate is `ca.pem` in `dir`.
        pub fn new(dir: &Path) -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            let cert = params.self_signed(&key).unwrap();
            fs::write(dir.join("ca.pem"), cert.pem()).unwrap();
            Self {
                dir: dir.to_owned(),
                issuer: Issuer::new(params, key),
            }
        }

        /// Writes a certificate for these names and its key, as `NAME.pem` and `NAME.key`.
        pub fn issue(&self, name: &str, params: &CertificateParams) -> TlsFiles {
            let key = KeyPair::generate().unwrap();
            let cert = params.signed_by(&key, &self.issuer).unwrap();
            let files = TlsFiles {
                cert: self.dir.join(format!("{name}.pem")),
                key: self.dir.join(format!("{name}.key")),
                client_ca: None,
            };
            fs::write(&files.cert, cert.pem()).unwrap();
            fs::write(&files.key, key.serialize_pem()).unwrap();
            files
        }

        /// The same for a server on this host.
        pub fn server(&self) -> TlsFiles {
            let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
            self.issue("server", &CertificateParams::new(names).unwrap())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Authority;
    use super::*;

    #[test]
    fn certificate_that_changed_is_used_once_it_is_sound() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(dir.path());
        let files = authority.server();
        let tls = Tls::load(files.clone(), &[]).unwrap();
        let first = tls.config();
        tls.look();
        assert!(Arc::ptr_eq(&first, &tls.config()), "nothing has changed");

        let key = fs::read(&files.key).unwrap();
        authority.server();
        let (cert, other) = (
            fs::read(&files.cert).unwrap(),
            fs::read(&files.key).unwrap(),
        );
        fs::write(&files.key, key).unwrap();
        tls.look();
        assert!(Arc::ptr_eq(&first, &tls.config()), "the key is not its");
        fs::write(&files.cert, &cert[..cert.len() / 2]).unwrap();
        tls.look();
        assert!(Arc::ptr_eq(&first, &tls.config()), "it is half there");
        fs::write(&files.cert, &cert).unwrap();
        fs::write(&files.key, &other).unwrap();
        tls.look();
        assert!(!Arc::ptr_eq(&first, &tls.config()));
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let files = Authority::new(dir.path()).server();
        let load = |files| Tls::load(files, &[]).unwrap_err().to_string();
        let none = TlsFiles {
            key: dir.path().join("none"),
            ..files.clone()
        };
        assert!(load(none).contains("none: "));
        let no_cert = TlsFiles {
            cert: files.key.clone(),
            ..files
        };
        assert!(load(no_cert).contains("there is none in it"));
    }
}
