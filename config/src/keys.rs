//! The one table of keys: name, documentation, how to read it and how to show it.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use toml::de::DeValue;

use crate::{Bound, Config, LogFormat, Secret, Size, TenantAttach, UblkMode, UploadCheck};

/// A key of the file.
pub(crate) struct Key {
    /// `section.name`.
    pub path: &'static str,
    /// What it is for: the comment above it in the example.
    pub doc: &'static str,
    /// What its value must be, as in "write …".
    pub expected: &'static str,
    /// A value in TOML, for the example, when it has no default.
    pub sample: &'static str,
    /// Its value must not be shown.
    pub secret: bool,
    /// Takes the value; relative paths start at the given directory. The error says what is wrong.
    pub set: fn(&mut Config, &DeValue<'_>, &Path) -> Result<(), String>,
    /// The value in TOML; none if it is not set.
    pub get: fn(&Config) -> Option<String>,
}

impl Key {
    /// The part before the dot.
    pub fn section(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(section, _)| section)
    }

    /// The part after the dot.
    pub fn name(&self) -> &'static str {
        self.path
            .split_once('.')
            .map_or(self.path, |(_, name)| name)
    }
}

/// What each section is about, in the file's order.
pub(crate) const SECTIONS: [(&str, &str); 12] = [
    ("daemon", "Where the daemon lives and how it is reached."),
    ("access", "Who may reach what."),
    ("store", "The object store that keeps everything durable."),
    (
        "keys",
        "The keys that wrap the data keys of encrypted volumes, each known by a name: one of these three.",
    ),
    (
        "cache",
        "The local cache device: hot data, and writes that the store does not have yet.",
    ),
    ("reactor", "The threads that serve I/O."),
    ("ublk", "The volumes' block devices, /dev/ublkbN."),
    ("reclaim", "What volumes do not need any more in the store."),
    ("writeback", "The way from the cache to the store."),
    ("trash", "Deleted volumes, until their objects are deleted."),
    (
        "prices",
        "What the store's provider takes, in one currency: what tenants and volumes cost is told by it.",
    ),
    (
        "tracing",
        "Traces of slow requests, from the queue to the store, sent to an OpenTelemetry collector.",
    ),
];

const SIZE: &str = "write a size such as \"64MiB\"";
const PATH: &str = "write a path in quotes";
const ADDRESS: &str = "write an address and a port such as \"127.0.0.1:9464\"";
const TEXT: &str = "write a text in quotes";
const COUNT: &str = "write a whole number";
const PRICE: &str = "write a number such as 0.005";

pub(crate) const KEYS: &[Key] = &[
    Key {
        path: "daemon.data_dir",
        doc: "Directory for what this host keeps itself: which volumes are attached, and the cache unless\n\
              [cache] path puts it elsewhere. Each daemon needs one of its own. /var/lib/quarry for root, else quarry/\n\
              under $XDG_STATE_HOME.",
        expected: PATH,
        sample: "",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.daemon.data_dir = p),
        get: |c| Some(quoted(c.daemon.data_dir.display())),
    },
    Key {
        path: "daemon.socket",
        doc: "Unix socket of the control plane (mode 0660), for those in [access] operators. Clients find it by --socket\n\
              or QUARRY_SOCKET.",
        expected: PATH,
        sample: "",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.daemon.socket = p),
        get: |c| Some(quoted(c.daemon.socket.display())),
    },
    Key {
        path: "daemon.listen",
        doc: "TCP address that answers /metrics, /healthz and /readyz, and to this host the status page. Unset: the\n\
              unix socket alone answers them.",
        expected: ADDRESS,
        sample: "\"127.0.0.1:9464\"",
        secret: false,
        set: |c, v, _| parsed(v).map(|a| c.daemon.listen = Some(a)),
        get: |c| c.daemon.listen.map(quoted),
    },
    Key {
        path: "daemon.nbd_socket",
        doc: "Unix socket of the NBD server. Unset: beside the control socket and named after it\n\
              (quarry.sock gives quarry-nbd.sock).",
        expected: PATH,
        sample: "\"/run/quarry/quarry-nbd.sock\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.daemon.nbd_socket = Some(p)),
        get: |c| c.daemon.nbd_socket.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "daemon.nbd_listen",
        doc: "TCP address of the NBD server: by TLS, for clients with certificates, with [access] nbd_client_ca. Without,\n\
              whoever reaches the port reaches every attached volume, so it must be on loopback (or see\n\
              [access] nbd_insecure).",
        expected: "write an address and a port such as \"127.0.0.1:10809\"",
        sample: "\"127.0.0.1:10809\"",
        secret: false,
        set: |c, v, _| parsed(v).map(|a| c.daemon.nbd_listen = Some(a)),
        get: |c| c.daemon.nbd_listen.map(quoted),
    },
    Key {
        path: "daemon.journal_dir",
        doc: "Folder for what must outlive the daemon but not the host: where unflushed writes lie on the\n\
              cache, 260 KiB a volume. Best on a tmpfs, and the same at every start: a journal that is not\n\
              found is taken for none. /run/quarry/journal for root, else quarry/journal under $XDG_RUNTIME_DIR.",
        expected: PATH,
        sample: "",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.daemon.journal_dir = p),
        get: |c| Some(quoted(c.daemon.journal_dir.display())),
    },
    Key {
        path: "daemon.stop_time_max",
        doc: "How long a daemon that is told to stop waits for the store to take everything. What is left then\n\
              stays in the cache, for the next daemon on this host.",
        expected: "write a duration such as \"60s\"",
        sample: "",
        secret: false,
        set: |c, v, _| duration(v).map(|d| c.daemon.stop_time_max = d),
        get: |c| Some(quoted(humantime::format_duration(c.daemon.stop_time_max))),
    },
    Key {
        path: "daemon.log",
        doc: "Form of the log on standard error: \"human\" or \"json\".",
        expected: "write \"human\" or \"json\"",
        sample: "",
        secret: false,
        set: |c, v, _| {
            c.daemon.log = match text(v)? {
                "human" => LogFormat::Human,
                "json" => LogFormat::Json,
                _ => return Err("there is no such form".to_owned()),
            };
            Ok(())
        },
        get: |c| Some(quoted(c.daemon.log.as_str())),
    },
    Key {
        path: "daemon.log_filter",
        doc: "What is logged: error, warn, info, debug or trace, or filters such as \"info,quarry_gateway=debug\".\n\
              The variable RUST_LOG wins over it.",
        expected: TEXT,
        sample: "",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.daemon.log_filter = t.to_owned()),
        get: |c| Some(quoted(&c.daemon.log_filter)),
    },
    Key {
        path: "access.operators",
        doc: "Who may do everything by the control socket, beside root and the daemon's own user: users, and\n\
              groups as \"group:NAME\". Others are refused, whatever the socket's mode lets them.",
        expected: "write a list such as [\"alice\", \"group:storage\"]",
        sample: "[\"alice\", \"group:storage\"]",
        secret: false,
        set: |c, v, _| texts(v).map(|t| c.access.operators = t),
        get: |c| (!c.access.operators.is_empty()).then(|| list(&c.access.operators)),
    },
    Key {
        path: "access.listen",
        doc: "TCP address of the API, for those who bear a token (`quarry token create`), by TLS. Unset: the unix\n\
              socket alone.",
        expected: "write an address and a port such as \"0.0.0.0:9443\"",
        sample: "\"0.0.0.0:9443\"",
        secret: false,
        set: |c, v, _| parsed(v).map(|a| c.access.listen = Some(a)),
        get: |c| c.access.listen.map(quoted),
    },
    Key {
        path: "access.tls_cert",
        doc: "The server's certificate, and those up to its root, in PEM. Read again when it changes.",
        expected: PATH,
        sample: "\"/etc/quarry/server.pem\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.access.tls_cert = Some(p)),
        get: |c| c.access.tls_cert.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "access.tls_key",
        doc: "Its private key, in PEM.",
        expected: PATH,
        sample: "\"/etc/quarry/server.key\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.access.tls_key = Some(p)),
        get: |c| c.access.tls_key.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "access.insecure",
        doc: "Whether the API may be served on loopback without TLS: tokens are then for all on the host to read.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.access.insecure = b),
        get: |c| Some(c.access.insecure.to_string()),
    },
    Key {
        path: "access.nbd_client_ca",
        doc: "Authorities, in PEM, of the certificates that NBD clients over TCP must show. A certificate's names (CN,\n\
              DNS, or URI as \"quarry:NAME\") are what it opens: \"acme\" all of a tenant's volumes, \"acme/db\" one.",
        expected: PATH,
        sample: "\"/etc/quarry/nbd-clients.pem\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.access.nbd_client_ca = Some(p)),
        get: |c| c.access.nbd_client_ca.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "access.nbd_insecure",
        doc: "Whether NBD may be served without TLS elsewhere than on loopback: whoever reaches the port then reaches\n\
              every attached volume.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.access.nbd_insecure = b),
        get: |c| Some(c.access.nbd_insecure.to_string()),
    },
    Key {
        path: "access.tenant_attach",
        doc: "By what a tenant's administrator may attach its volumes to this host: \"nbd\", \"any\" (block devices\n\
              too) or \"none\".",
        expected: "write \"nbd\", \"any\" or \"none\"",
        sample: "",
        secret: false,
        set: |c, v, _| {
            one_of(v, TenantAttach::ALL, TenantAttach::as_str, "way")
                .map(|way| c.access.tenant_attach = way)
        },
        get: |c| Some(quoted(c.access.tenant_attach.as_str())),
    },
    Key {
        path: "access.audit_log",
        doc: "File that every change by the API is written to, and every call that was refused, as lines of JSON (mode\n\
              0600; 8 of 16 MiB are kept). Unset: \"audit.jsonl\" in data_dir.",
        expected: PATH,
        sample: "\"/var/log/quarry/audit.jsonl\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.access.audit_log = Some(p)),
        get: |c| c.access.audit_log.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "access.audit_required",
        doc: "Whether a change is refused that cannot be written there first. Otherwise it is carried out, and\n\
              `quarry status`, the log and quarry_audit_failures_total tell.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.access.audit_required = b),
        get: |c| Some(c.access.audit_required.to_string()),
    },
    Key {
        path: "store.url",
        doc: "Where the objects are: s3://bucket/prefix or file:///dir. It has no default.",
        expected: "write \"s3://bucket/prefix\" or \"file:///dir\"",
        sample: "\"s3://my-bucket/quarry\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.store.url = Some(t.to_owned())),
        get: |c| c.store.url.as_ref().map(quoted),
    },
    Key {
        path: "store.endpoint",
        doc: "URL of an S3 server other than Amazon's. Unset: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or\n\
              AWS_ENDPOINT, else Amazon's.",
        expected: "write a URL such as \"https://s3.example.com\"",
        sample: "\"http://127.0.0.1:8333\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.store.endpoint = Some(t.to_owned())),
        get: |c| c.store.endpoint.as_ref().map(quoted),
    },
    Key {
        path: "store.region",
        doc: "Region of the bucket. Unset: AWS_REGION or AWS_DEFAULT_REGION.",
        expected: TEXT,
        sample: "\"eu-central-1\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.store.region = Some(t.to_owned())),
        get: |c| c.store.region.as_ref().map(quoted),
    },
    Key {
        path: "store.access_key",
        doc: "Id of the access key. Unset: AWS_ACCESS_KEY_ID, with its secret and token from\n\
              AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, else the machine's role.",
        expected: TEXT,
        sample: "\"AKIAIOSFODNN7EXAMPLE\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.store.access_key = Some(t.to_owned())),
        get: |c| c.store.access_key.as_ref().map(quoted),
    },
    Key {
        path: "store.secret_key_file",
        doc: "File that holds the secret of access_key and nothing else.",
        expected: PATH,
        sample: "\"/etc/quarry/secret-key\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.store.secret_key_file = Some(p)),
        get: |c| {
            c.store
                .secret_key_file
                .as_ref()
                .map(|p| quoted(p.display()))
        },
    },
    Key {
        path: "store.secret_key",
        doc: "The secret itself; better in a file of its own, see secret_key_file.",
        expected: TEXT,
        sample: "\"...\"",
        secret: true,
        set: |c, v, _| text(v).map(|t| c.store.secret_key = Some(Secret::new(t))),
        get: |_| None,
    },
    Key {
        path: "store.session_token",
        doc: "Token that belongs to a temporary access_key.",
        expected: TEXT,
        sample: "\"...\"",
        secret: true,
        set: |c, v, _| text(v).map(|t| c.store.session_token = Some(Secret::new(t))),
        get: |_| None,
    },
    Key {
        path: "store.credentials",
        doc: "Who is asked for keys, in place of all that, again every minute, so that they can be rotated:\n\
              \"profile:NAME\" (keys, a role to assume, a program), \"environment\", \"web-identity\" or\n\
              \"instance-metadata\".",
        expected: TEXT,
        sample: "\"profile:quarry\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.store.credentials = Some(t.to_owned())),
        get: |c| c.store.credentials.as_ref().map(quoted),
    },
    Key {
        path: "store.credentials_file",
        doc: "File of the profiles, in the form of ~/.aws/credentials, also of those that tenants' stores name.\n\
              Unset: where AWS programs look for them.",
        expected: PATH,
        sample: "\"/etc/quarry/credentials\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.store.credentials_file = Some(p)),
        get: |c| {
            c.store
                .credentials_file
                .as_ref()
                .map(|p| quoted(p.display()))
        },
    },
    Key {
        path: "store.path_style",
        doc: "Whether the bucket is in a request's path rather than in its host name. Unset: true with an\n\
              endpoint, false without.",
        expected: "write true or false",
        sample: "true",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.store.path_style = Some(b)),
        get: |c| c.store.path_style.map(|b| b.to_string()),
    },
    Key {
        path: "store.upload_check",
        doc: "What vouches for a chunk on its way to the store: \"signature\" (the request's, with a SHA-256 of all of it: a\n\
              quarter of an upload's work, and as much again for the server), \"crc64nvme\" (a checksum in a header, which\n\
              the server compares), \"none\" (the connection alone), or \"auto\": crc64nvme if the server refuses a wrong\n\
              one, as it is asked to with two small objects before the first upload, else signature. Small objects are\n\
              always signed. A tenant's own server is always asked, unless it is \"signature\".",
        expected: "write \"auto\", \"signature\", \"crc64nvme\" or \"none\"",
        sample: "",
        secret: false,
        set: |c, v, _| {
            one_of(v, UploadCheck::ALL, UploadCheck::as_str, "check")
                .map(|check| c.store.upload_check = check)
        },
        get: |c| Some(quoted(c.store.upload_check.as_str())),
    },
    Key {
        path: "store.make_missing",
        doc: "Whether the daemon makes the bucket, or the folder and a store in it, if there is none. With false a misspelt\n\
              name is refused, and so is a folder that has no store in it: an empty one, or the mount point of one that is\n\
              not mounted. So a folder's first start needs true. A tenant's own folder is made by the command that gives it.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.store.make_missing = b),
        get: |c| Some(c.store.make_missing.to_string()),
    },
    Key {
        path: "keys.keyring",
        doc: "File of keys, `name base64-of-32-bytes` a line (`quarry key generate` makes one), readable by its owner\n\
              alone: root, or the daemon's user. It is read anew for each use. Of several keys of one name the last\n\
              wraps, and all are tried to unwrap. A key that is lost is lost with all that it wraps: keep a copy.",
        expected: PATH,
        sample: "\"/etc/quarry/keyring\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.keys.keyring = Some(p)),
        get: |c| c.keys.keyring.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "keys.command",
        doc: "Program that has them, called as `PROGRAM wrap NAME` and `PROGRAM unwrap NAME`: bytes come by standard\n\
              input and go by standard output, within 10 s.",
        expected: PATH,
        sample: "\"/usr/local/bin/quarry-kms\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.keys.command = Some(p)),
        get: |c| c.keys.command.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "keys.url",
        doc: "Service that has them, by https (or http on this host). It is posted {\"operation\": \"wrap\" or \"unwrap\",\n\
              \"key\": name, \"data\": base64} and answers {\"data\": base64}, within 10 s.",
        expected: "write a URL such as \"https://kms.example.com/quarry\"",
        sample: "\"https://kms.example.com/quarry\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.keys.url = Some(t.to_owned())),
        get: |c| c.keys.url.as_ref().map(quoted),
    },
    Key {
        path: "cache.path",
        doc: "File or block device of the cache; a missing file is made. Losing it loses the writes that\n\
              the store does not have yet, never more. Unset: the file \"cache\" in data_dir.",
        expected: PATH,
        sample: "\"/dev/disk/by-id/nvme-cache\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.cache.path = Some(p)),
        get: |c| c.cache.path.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "cache.size",
        doc: "How much of it to use. Unset: 8GiB of a file, all of a block device. For a new cache only: one that is there\n\
              keeps its size.",
        expected: SIZE,
        sample: "\"8GiB\"",
        secret: false,
        set: |c, v, _| size(v).map(|s| c.cache.size = Some(s)),
        get: |c| c.cache.size.map(quoted),
    },
    Key {
        path: "cache.dirty_max",
        doc: "How much of the cache may hold writes that the store does not have yet, as a share or a size.\n\
              When it is reached, writes wait for the store.",
        expected: "write a share such as \"70%\" or a size such as \"4GiB\"",
        sample: "",
        secret: false,
        set: |c, v, _| {
            c.cache.dirty_max = match v.as_integer() {
                Some(_) => Bound::Size(size(v)?),
                None => text(v)?
                    .parse()
                    .map_err(|_| "it is neither a share nor a size".to_owned())?,
            };
            Ok(())
        },
        get: |c| Some(quoted(c.cache.dirty_max)),
    },
    Key {
        path: "cache.ram",
        doc: "Memory for map nodes and data in front of the cache device. Map nodes, half of it, leave room for what else the\n\
              process keeps in memory, down to a quarter of theirs.",
        expected: SIZE,
        sample: "",
        secret: false,
        set: |c, v, _| size(v).map(|s| c.cache.ram = s),
        get: |c| Some(quoted(c.cache.ram)),
    },
    Key {
        path: "cache.keep_index",
        doc: "Whether what the cache has of the store is known again after a restart. Start once with false after objects were\n\
              put back from a copy: the cache goes by their names. It takes a thousandth or two of the cache's size in\n\
              data_dir. A cache that was made by a version without this forgets it in any case.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.cache.keep_index = b),
        get: |c| Some(c.cache.keep_index.to_string()),
    },
    Key {
        path: "cache.page_cache",
        doc: "Whether reads that pass the daemon's memory (by NBD, and by ublk without zero copy) may come from the\n\
              kernel's page cache, which keeps what was read lately as long as nobody else needs the memory. Only with\n\
              a cache that is a file of ext4, XFS or btrfs: a block device's cached pages can be older than the device.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.cache.page_cache = b),
        get: |c| Some(c.cache.page_cache.to_string()),
    },
    Key {
        path: "cache.hot_set",
        doc: "Whether a volume that is detached leaves word of what was read most, and one that is attached has that\n\
              fetched into the cache in the background.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.cache.hot_set = b),
        get: |c| Some(c.cache.hot_set.to_string()),
    },
    Key {
        path: "cache.warm_rate",
        doc: "How much is fetched a second into the cache on somebody's word (hot sets, `quarry volume warm`), all\n\
              volumes together.",
        expected: SIZE,
        sample: "",
        secret: false,
        set: |c, v, _| size(v).map(|s| c.cache.warm_rate = s),
        get: |c| Some(quoted(c.cache.warm_rate)),
    },
    Key {
        path: "cache.encrypt",
        doc: "Whether the data on it are encrypted (AES-256-XTS), so that a disk that is taken away tells nothing of them.\n\
              It costs zero copy: requests pass through the daemon's memory. For a new cache only: one that is there\n\
              stays as it was made.",
        expected: "write true or false",
        sample: "",
        secret: false,
        set: |c, v, _| boolean(v).map(|b| c.cache.encrypt = b),
        get: |c| Some(c.cache.encrypt.to_string()),
    },
    Key {
        path: "cache.key",
        doc: "Name of the key that wraps the cache's own, had as [keys] says. A cache that is there goes on with the\n\
              one that it was made with.",
        expected: TEXT,
        sample: "\"host-7\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.cache.key = Some(t.to_owned())),
        get: |c| c.cache.key.as_ref().map(quoted),
    },
    Key {
        path: "reactor.threads",
        doc: "How many threads serve I/O; each serves many volumes. By default one a CPU, at most 4.",
        expected: COUNT,
        sample: "",
        secret: false,
        set: |c, v, _| count(v).map(|n| c.reactor.threads = n),
        get: |c| Some(c.reactor.threads.to_string()),
    },
    Key {
        path: "ublk.mode",
        doc: "The best way that requests' data may go between their own pages and the cache: \"zero-copy\" (Linux\n\
              6.16), \"zero-copy-by-hand\" (6.15), \"user-copy\" (6.5) or \"plain\". The kernel's best one up to it is\n\
              taken, for devices made from now on; those that are there keep theirs.",
        expected: "write \"zero-copy\", \"zero-copy-by-hand\", \"user-copy\" or \"plain\"",
        sample: "",
        secret: false,
        set: |c, v, _| {
            one_of(v, UblkMode::ALL, UblkMode::as_str, "mode").map(|mode| c.ublk.mode = mode)
        },
        get: |c| Some(quoted(c.ublk.mode.as_str())),
    },
    Key {
        path: "reclaim.horizon",
        doc: "How long an object that a volume does not need any more is kept. Whoever has the volume attached\n\
              read-only elsewhere may go by a map of so long ago; for longer, attach a snapshot.",
        expected: "write a duration such as \"15m\"",
        sample: "",
        secret: false,
        set: |c, v, _| duration(v).map(|d| c.reclaim.horizon = d),
        get: |c| Some(quoted(humantime::format_duration(c.reclaim.horizon))),
    },
    Key {
        path: "reclaim.debt_min",
        doc: "How much at least must be to gain in a volume before the live parts of its chunks are moved.",
        expected: SIZE,
        sample: "",
        secret: false,
        set: |c, v, _| size(v).map(|s| c.reclaim.debt_min = s),
        get: |c| Some(quoted(c.reclaim.debt_min)),
    },
    Key {
        path: "reclaim.share",
        doc: "The share of the time that moving them takes at most, and so of the store's bandwidth, unless\n\
              much more than usual is to gain.",
        expected: "write a share such as \"50%\"",
        sample: "",
        secret: false,
        set: |c, v, _| match text(v)?.parse() {
            Ok(Bound::Percent(percent)) if percent > 0 => {
                c.reclaim.percent = percent;
                Ok(())
            }
            _ => Err("it is not a share of 1% to 100%".to_owned()),
        },
        get: |c| Some(quoted(Bound::Percent(c.reclaim.percent))),
    },
    Key {
        path: "reclaim.orphan_interval",
        doc: "How often the objects of an attached volume are listed for such that nothing names: what a crash or a\n\
              lost host left. A request for a thousand objects.",
        expected: "write a duration such as \"1d\"",
        sample: "",
        secret: false,
        set: |c, v, _| duration(v).map(|d| c.reclaim.orphan_interval = d),
        get: |c| {
            Some(quoted(humantime::format_duration(
                c.reclaim.orphan_interval,
            )))
        },
    },
    Key {
        path: "writeback.delay",
        doc: "How long an acknowledged write waits at most before its upload starts. Shorter loses less with\n\
              the host, longer makes bigger chunks of scattered writes.",
        expected: "write a duration such as \"5s\" or \"500ms\"",
        sample: "",
        secret: false,
        set: |c, v, _| duration(v).map(|d| c.writeback.delay = d),
        get: |c| Some(quoted(humantime::format_duration(c.writeback.delay))),
    },
    Key {
        path: "writeback.chunk_size",
        doc: "Data that make a chunk full, which is then uploaded at once.",
        expected: SIZE,
        sample: "",
        secret: false,
        set: |c, v, _| size(v).map(|s| c.writeback.chunk_size = s),
        get: |c| Some(quoted(c.writeback.chunk_size)),
    },
    Key {
        path: "writeback.uploads_max",
        doc: "How many chunks are uploaded at once.",
        expected: COUNT,
        sample: "",
        secret: false,
        set: |c, v, _| count(v).map(|n| c.writeback.uploads_max = n),
        get: |c| Some(c.writeback.uploads_max.to_string()),
    },
    Key {
        path: "trash.grace",
        doc: "How long a deleted volume can be restored. Then this daemon deletes its objects, whichever host deleted\n\
              the volume, by this host's clock: the same on all hosts is best. \"0s\": at once.",
        expected: "write a duration such as \"7d\"",
        sample: "",
        secret: false,
        set: |c, v, _| duration(v).map(|d| c.trash.grace = d),
        get: |c| Some(quoted(humantime::format_duration(c.trash.grace))),
    },
    Key {
        path: "prices.put",
        doc: "For 1,000 objects written.",
        expected: PRICE,
        sample: "0.005",
        secret: false,
        set: |c, v, _| price(v).map(|p| c.prices.put = p),
        get: |c| (c.prices.put > 0.0).then(|| c.prices.put.to_string()),
    },
    Key {
        path: "prices.get",
        doc: "For 1,000 objects read, or parts of them.",
        expected: PRICE,
        sample: "0.0004",
        secret: false,
        set: |c, v, _| price(v).map(|p| c.prices.get = p),
        get: |c| (c.prices.get > 0.0).then(|| c.prices.get.to_string()),
    },
    Key {
        path: "prices.list",
        doc: "For 1,000 listings.",
        expected: PRICE,
        sample: "0.005",
        secret: false,
        set: |c, v, _| price(v).map(|p| c.prices.list = p),
        get: |c| (c.prices.list > 0.0).then(|| c.prices.list.to_string()),
    },
    Key {
        path: "prices.delete",
        doc: "For 1,000 objects deleted.",
        expected: PRICE,
        sample: "0.0",
        secret: false,
        set: |c, v, _| price(v).map(|p| c.prices.delete = p),
        get: |c| (c.prices.delete > 0.0).then(|| c.prices.delete.to_string()),
    },
    Key {
        path: "prices.read_gib",
        doc: "For a GiB received from it.",
        expected: PRICE,
        sample: "0.09",
        secret: false,
        set: |c, v, _| price(v).map(|p| c.prices.read_gib = p),
        get: |c| (c.prices.read_gib > 0.0).then(|| c.prices.read_gib.to_string()),
    },
    Key {
        path: "prices.written_gib",
        doc: "For a GiB sent to it.",
        expected: PRICE,
        sample: "0.0",
        secret: false,
        set: |c, v, _| price(v).map(|p| c.prices.written_gib = p),
        get: |c| (c.prices.written_gib > 0.0).then(|| c.prices.written_gib.to_string()),
    },
    Key {
        path: "tracing.endpoint",
        doc: "URL of the collector, which is called by OTLP over HTTP (protobuf) at /v1/traces below it. Unset:\n\
              OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, else nothing is traced.",
        expected: "write a URL such as \"http://127.0.0.1:4318\"",
        sample: "\"http://127.0.0.1:4318\"",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.tracing.endpoint = Some(t.to_owned())),
        get: |c| c.tracing.endpoint.as_ref().map(quoted),
    },
    Key {
        path: "tracing.slow",
        doc: "From how long on a request is slow, and traced.",
        expected: "write a duration such as \"100ms\"",
        sample: "",
        secret: false,
        set: |c, v, _| duration(v).map(|d| c.tracing.slow = d),
        get: |c| Some(quoted(humantime::format_duration(c.tracing.slow))),
    },
    Key {
        path: "tracing.sample_misses",
        doc: "The share of the reads that wait for the store which are traced however short they take, 0 to 1.",
        expected: "write a number such as 0.001",
        sample: "",
        secret: false,
        set: |c, v, _| price(v).map(|p| c.tracing.sample_misses = p),
        get: |c| Some(c.tracing.sample_misses.to_string()),
    },
    Key {
        path: "tracing.headers_file",
        doc: "File of headers that go along with each call, `Name: value` a line, an Authorization say. It is read\n\
              anew for each call, and never shown.",
        expected: PATH,
        sample: "\"/etc/quarry/collector-headers\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.tracing.headers_file = Some(p)),
        get: |c| c.tracing.headers_file.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "tracing.ca",
        doc: "Authorities, in PEM, of which one must have signed the collector's certificate. Unset: those that the\n\
              host trusts.",
        expected: PATH,
        sample: "\"/etc/quarry/collector-ca.pem\"",
        secret: false,
        set: |c, v, base| path(v, base).map(|p| c.tracing.ca = Some(p)),
        get: |c| c.tracing.ca.as_ref().map(|p| quoted(p.display())),
    },
    Key {
        path: "tracing.service_name",
        doc: "What the daemon is called in traces (service.name); OTEL_SERVICE_NAME wins over the default. What else\n\
              is to be said of it, OTEL_RESOURCE_ATTRIBUTES names.",
        expected: TEXT,
        sample: "",
        secret: false,
        set: |c, v, _| text(v).map(|t| c.tracing.service_name = t.to_owned()),
        get: |c| Some(quoted(&c.tracing.service_name)),
    },
];

/// The key with this path.
pub(crate) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

fn quoted(value: impl Display) -> String {
    toml::Value::String(value.to_string()).to_string()
}

fn wrong_type(value: &DeValue<'_>) -> String {
    let article = if matches!(value, DeValue::Integer(_) | DeValue::Array(_)) {
        "an"
    } else {
        "a"
    };
    format!("it is {article} {}", value.type_str())
}

fn text<'a>(value: &'a DeValue<'_>) -> Result<&'a str, String> {
    let text = value.as_str().ok_or_else(|| wrong_type(value))?;
    if text.is_empty() {
        Err("it is empty".to_owned())
    } else {
        Ok(text)
    }
}

fn price(value: &DeValue<'_>) -> Result<f64, String> {
    let text = match value {
        DeValue::Float(number) => number.as_str(),
        DeValue::Integer(number) => number.as_str(),
        _ => return Err("it is not a number".to_owned()),
    };
    let number: Option<f64> = text.parse().ok();
    number
        .filter(|n| n.is_finite() && *n >= 0.0)
        .ok_or_else(|| "it is not a price".to_owned())
}

fn texts(value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let all = value.as_array().ok_or_else(|| wrong_type(value))?;
    let texts = all
        .iter()
        .map(|item| text(item.get_ref()).map(str::to_owned));
    texts.collect()
}

fn list(texts: &[String]) -> String {
    let all: Vec<_> = texts.iter().map(quoted).collect();
    format!("[{}]", all.join(", "))
}

fn boolean(value: &DeValue<'_>) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| wrong_type(value))
}

/// One of `all`, by its word; `kind` says what there is none of.
fn one_of<T: Copy, const N: usize>(
    value: &DeValue<'_>,
    all: [T; N],
    word: impl Fn(T) -> &'static str,
    kind: &str,
) -> Result<T, String> {
    let text = text(value)?;
    let found = all.into_iter().find(|one| word(*one) == text);
    found.ok_or_else(|| format!("there is no such {kind}"))
}

fn parsed<T: FromStr<Err: Display>>(value: &DeValue<'_>) -> Result<T, String> {
    text(value)?.parse().map_err(|e: T::Err| e.to_string())
}

fn path(value: &DeValue<'_>, base: &Path) -> Result<PathBuf, String> {
    text(value).map(|t| base.join(t))
}

fn integer(value: &DeValue<'_>) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn count(value: &DeValue<'_>) -> Result<u32, String> {
    if value.as_integer().is_none() {
        return Err(wrong_type(value));
    }
    integer(value)
        .and_then(|n| u32::try_from(n).ok())
        .ok_or_else(|| "it is out of range".to_owned())
}

fn size(value: &DeValue<'_>) -> Result<Size, String> {
    match value.as_integer() {
        Some(_) => integer(value)
            .map(Size::new)
            .ok_or_else(|| "it is out of range".to_owned()),
        None => text(value)?
            .parse()
            .map_err(|_| "it is not a size".to_owned()),
    }
}

fn duration(value: &DeValue<'_>) -> Result<Duration, String> {
    humantime::parse_duration(text(value)?).map_err(|_| "it is not a duration".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_names_each_key_once_in_a_known_section() {
        for (i, key) in KEYS.iter().enumerate() {
            assert!(
                SECTIONS.iter().any(|(name, _)| *name == key.section()),
                "{}",
                key.path
            );
            assert!(
                KEYS.iter().skip(i + 1).all(|other| other.path != key.path),
                "{}",
                key.path
            );
            assert!(
                !key.sample.is_empty() || (key.get)(&Config::default()).is_some(),
                "{} shows nothing",
                key.path
            );
        }
    }
}
