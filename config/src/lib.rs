//! The daemon's configuration: a typed TOML file, the flags that win over it, and the standard
//! `AWS_*` variables that stand in where the file is silent.
//!
//! Owns the names, defaults, limits and documentation of all keys: one table (`keys`) drives the
//! reader, the nearest-name suggestions and the commented example, so they cannot disagree.
//! Does not own what the values mean to the daemon, and opens no file but the configuration and
//! the secret key that it names.
//!
//! Invariants: a [`Config`] handed out by [`Config::load`] or [`Config::complete`] is within all
//! limits; a secret never appears in `Debug`, in an error or in the example.

#![forbid(unsafe_code)]

mod error;
mod example;
mod keys;
mod overrides;
mod paths;
mod read;
mod validate;
mod value;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use error::{ConfigError, Place};
pub use overrides::Overrides;
pub use paths::client_socket;
pub use value::{Bound, LogFormat, Secret, Size, SizeError, TenantAttach, UblkMode, UploadCheck};

/// Everything that the daemon can be told.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Config {
    /// `[daemon]`
    pub daemon: Daemon,
    /// `[access]`
    pub access: Access,
    /// `[store]`
    pub store: Store,
    /// `[keys]`
    pub keys: Keys,
    /// `[cache]`
    pub cache: Cache,
    /// `[reactor]`
    pub reactor: Reactor,
    /// `[ublk]`
    pub ublk: Ublk,
    /// `[writeback]`
    pub writeback: Writeback,
    /// `[reclaim]`
    pub reclaim: Reclaim,
    /// `[trash]`
    pub trash: Trash,
    /// `[prices]`
    pub prices: Prices,
    /// `[tracing]`
    pub tracing: Tracing,
}

/// `[daemon]`: where the daemon lives and how it is reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Daemon {
    /// What the host itself keeps: the list of attached volumes, and the cache unless it is elsewhere.
    pub data_dir: PathBuf,
    /// The control plane's unix socket.
    pub socket: PathBuf,
    /// TCP address of `/metrics`, `/healthz`, `/readyz` and, for this host, the status page; none: on the unix socket only.
    pub listen: Option<SocketAddr>,
    /// The NBD server's unix socket; none: see [`Config::nbd_socket`].
    pub nbd_socket: Option<PathBuf>,
    /// TCP address of the NBD server; none: on its unix socket only.
    pub nbd_listen: Option<SocketAddr>,
    /// Folder of the journals, each cache device's in one of its own. The same for every start on a
    /// cache device: a journal that is not found is taken for none.
    pub journal_dir: PathBuf,
    /// How long the end waits for uploads.
    pub stop_time_max: Duration,
    /// Form of the log on standard error.
    pub log: LogFormat,
    /// What is logged, in the syntax of `RUST_LOG` (which wins over it).
    pub log_filter: String,
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            data_dir: paths::data_dir(),
            socket: paths::daemon_socket(),
            listen: None,
            nbd_socket: None,
            nbd_listen: None,
            journal_dir: paths::journal_dir(),
            stop_time_max: Duration::from_secs(60),
            log: LogFormat::default(),
            log_filter: "info,libublk=warn".to_owned(),
        }
    }
}

/// `[access]`: who may reach what.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Access {
    /// Users, and groups as `group:NAME`, who may do everything by the control socket, beside root and the daemon's
    /// own user.
    pub operators: Vec<String>,
    /// TCP address of the API; none: on the unix socket only.
    pub listen: Option<SocketAddr>,
    /// The server's certificate for TCP, and those up to its root.
    pub tls_cert: Option<PathBuf>,
    /// Its key.
    pub tls_key: Option<PathBuf>,
    /// Plain HTTP, on loopback.
    pub insecure: bool,
    /// The authorities of the certificates that NBD clients over TCP show; none: it is served without TLS.
    pub nbd_client_ca: Option<PathBuf>,
    /// Whether NBD may be served without TLS elsewhere than on loopback.
    pub nbd_insecure: bool,
    /// By what tenants may attach their volumes.
    pub tenant_attach: TenantAttach,
    /// The audit log; none: `audit.jsonl` in the data folder.
    pub audit_log: Option<PathBuf>,
    /// Whether nothing is changed that cannot be written there.
    pub audit_required: bool,
}

/// `[store]`: the object store.
#[derive(Clone, Debug, PartialEq)]
pub struct Store {
    /// `s3://bucket/prefix` or `file:///dir`. Always set in what [`Config::complete`] returns.
    pub url: Option<String>,
    /// URL of an S3 server other than Amazon's.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// Id of the access key; none: found out from the machine's role.
    pub access_key: Option<String>,
    /// The secret that belongs to `access_key`.
    pub secret_key: Option<Secret>,
    /// File that holds the secret; [`Config::complete`] reads it into `secret_key`.
    pub secret_key_file: Option<PathBuf>,
    /// Token of a temporary access key.
    pub session_token: Option<Secret>,
    /// Who is asked for keys instead: `profile:NAME`, `environment`, `web-identity` or `instance-metadata`.
    pub credentials: Option<String>,
    /// File of the profiles, also of those of tenants; none: where AWS programs look for them.
    pub credentials_file: Option<PathBuf>,
    /// Bucket in the path rather than in the host name; none: yes with an endpoint, else no.
    pub path_style: Option<bool>,
    /// What vouches for large uploads on their way.
    pub upload_check: UploadCheck,
    /// Whether the daemon makes the bucket or the folder if there is none.
    pub make_missing: bool,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            url: None,
            endpoint: None,
            region: None,
            access_key: None,
            secret_key: None,
            secret_key_file: None,
            session_token: None,
            credentials: None,
            credentials_file: None,
            path_style: None,
            upload_check: UploadCheck::Auto,
            make_missing: true,
        }
    }
}

impl Store {
    /// Whether the bucket goes into the path of a request.
    #[must_use]
    pub fn uses_path_style(&self) -> bool {
        self.path_style.unwrap_or(self.endpoint.is_some())
    }
}

/// `[prices]`: what the store's provider takes, in one currency.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prices {
    /// For 1,000 objects written.
    pub put: f64,
    /// For 1,000 objects read, or parts of them.
    pub get: f64,
    /// For 1,000 listings.
    pub list: f64,
    /// For 1,000 objects deleted.
    pub delete: f64,
    /// For a GiB received.
    pub read_gib: f64,
    /// For a GiB sent.
    pub written_gib: f64,
}

/// `[keys]`: where the keys are had from that wrap the data keys of encrypted volumes; one way at most.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Keys {
    /// A file of keys.
    pub keyring: Option<PathBuf>,
    /// A program that wraps and unwraps.
    pub command: Option<PathBuf>,
    /// A service that does.
    pub url: Option<String>,
}

/// `[cache]`: the local cache device.
#[derive(Clone, Debug, PartialEq)]
pub struct Cache {
    /// A file or a block device; none: see [`Config::cache_path`].
    pub path: Option<PathBuf>,
    /// How much of it to use; none: 8 GiB of a file, all of a block device.
    pub size: Option<Size>,
    /// How much may hold data that the store does not have yet.
    pub dirty_max: Bound,
    /// Memory for cached data and map nodes.
    pub ram: Size,
    /// Whether what it has of the store is known again after a restart.
    pub keep_index: bool,
    /// Whether reads that pass the daemon's memory may come from the kernel's page cache.
    pub page_cache: bool,
    /// Whether what is hot goes with a volume to the next host.
    pub hot_set: bool,
    /// Bytes a second that warming fetches, all volumes together.
    pub warm_rate: Size,
    /// Whether the data on it are encrypted.
    pub encrypt: bool,
    /// The name of the key that wraps its own.
    pub key: Option<String>,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            path: None,
            size: None,
            dirty_max: Bound::Percent(70),
            ram: Size::new(256 << 20),
            keep_index: true,
            page_cache: true,
            hot_set: true,
            warm_rate: Size::new(200 << 20),
            encrypt: false,
            key: None,
        }
    }
}

/// `[reactor]`: the I/O threads.
#[derive(Clone, Debug, PartialEq)]
pub struct Reactor {
    /// How many; each serves the queues of many volumes.
    pub threads: u32,
}

impl Default for Reactor {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            threads: u32::try_from(cpus).unwrap_or(1).clamp(1, 4),
        }
    }
}

/// `[ublk]`: the volumes' block devices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ublk {
    /// The best way for the data of new devices; worse ones where the kernel has no better.
    pub mode: UblkMode,
}

/// `[writeback]`: from the cache to the store.
#[derive(Clone, Debug, PartialEq)]
pub struct Writeback {
    /// How long an acknowledged write waits at most before its upload starts.
    pub delay: Duration,
    /// Raw bytes that make a chunk full.
    pub chunk_size: Size,
    /// Chunk uploads under way at once.
    pub uploads_max: u32,
}

impl Default for Writeback {
    fn default() -> Self {
        Self {
            delay: Duration::from_secs(5),
            chunk_size: Size::new(8 << 20),
            uploads_max: 8,
        }
    }
}

/// `[reclaim]`: what the store does not need any more.
#[derive(Clone, Debug, PartialEq)]
pub struct Reclaim {
    /// How long it is kept all the same.
    pub horizon: Duration,
    /// So much at least must be to gain for compaction to begin.
    pub debt_min: Size,
    /// The share of the time that compaction takes, in hundredths.
    pub percent: u8,
    /// How often objects are looked for that nothing names.
    pub orphan_interval: Duration,
}

impl Default for Reclaim {
    fn default() -> Self {
        Self {
            horizon: Duration::from_secs(15 * 60),
            debt_min: Size::new(32 << 20),
            percent: 50,
            orphan_interval: Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// `[trash]`: deleted volumes.
#[derive(Clone, Debug, PartialEq)]
pub struct Trash {
    /// How long a deleted volume can be restored before its objects are deleted.
    pub grace: Duration,
}

impl Default for Trash {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }
}

/// `[tracing]`: traces of slow requests, for an OpenTelemetry collector.
#[derive(Clone, Debug, PartialEq)]
pub struct Tracing {
    /// The collector's URL; none: nothing is traced.
    pub endpoint: Option<String>,
    /// From how long on a request is slow.
    pub slow: Duration,
    /// The share of reads that wait for the store which are traced although they are not slow: 0 to 1.
    pub sample_misses: f64,
    /// File of headers that go along with each call.
    pub headers_file: Option<PathBuf>,
    /// The authorities of the collector's certificate; none: those that the host trusts.
    pub ca: Option<PathBuf>,
    /// What the daemon is called.
    pub service_name: String,
    /// What else is said of it, by name.
    pub resource: Vec<(String, String)>,
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            endpoint: None,
            slow: Duration::from_millis(100),
            sample_misses: 0.0,
            headers_file: None,
            ca: None,
            service_name: "quarry".to_owned(),
            resource: Vec::new(),
        }
    }
}

impl Config {
    /// The cache's path: the one configured, else `cache` in the data directory.
    #[must_use]
    pub fn cache_path(&self) -> PathBuf {
        self.cache
            .path
            .clone()
            .unwrap_or_else(|| self.daemon.data_dir.join("cache"))
    }

    /// The NBD server's unix socket: the one configured, else beside the control socket and named
    /// after it (`quarry.sock` gives `quarry-nbd.sock`).
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        if let Some(path) = &self.daemon.nbd_socket {
            return path.clone();
        }
        let socket = &self.daemon.socket;
        let mut name = socket.file_stem().unwrap_or_default().to_os_string();
        name.push("-nbd.sock");
        socket.with_file_name(name)
    }

    /// What is allowed but worth a second look, one sentence each.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        validate::notes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nbd_socket_unset_lies_beside_the_control_socket() {
        let mut config = Config::default();
        config.daemon.socket = "/run/quarry/second.sock".into();
        assert_eq!(
            config.nbd_socket(),
            PathBuf::from("/run/quarry/second-nbd.sock")
        );
        config.daemon.nbd_socket = Some("/tmp/n".into());
        assert_eq!(config.nbd_socket(), PathBuf::from("/tmp/n"));
    }

    #[test]
    fn cache_path_unset_lies_in_the_data_dir() {
        let mut config = Config::default();
        config.daemon.data_dir = "/data".into();
        assert_eq!(config.cache_path(), PathBuf::from("/data/cache"));
    }

    #[test]
    fn debug_with_secrets_hides_them() {
        let mut config = Config::default();
        config.store.secret_key = Some(Secret::new("hunter2"));
        config.store.session_token = Some(Secret::new("hunter3"));
        let shown = format!("{config:?} {config:#?}");
        assert!(!shown.contains("hunter"), "{shown}");
    }
}
