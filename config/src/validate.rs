//! The limits of all values, each with what to do about a value outside.

use std::ops::RangeInclusive;
use std::time::Duration;

use url::Url;

use crate::{Bound, Config, ConfigError, Size};

/// Smallest cache: a handful of the smallest segments.
const CACHE_BYTES_MIN: u64 = 16 << 20;
const RAM_BYTES_MIN: u64 = 16 << 20;
const DIRTY_BYTES_MIN: u64 = 4 << 20;
const DIRTY_PERCENT: RangeInclusive<u8> = 1..=95;
const THREADS: RangeInclusive<u32> = 1..=64;
const DELAY_MAX: Duration = Duration::from_secs(3600);

const ORPHAN_INTERVALS: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(365 * 24 * 3600);
/// Objects kept longer are a snapshot's business.
const HORIZON_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
const CHUNK_BYTES: RangeInclusive<u64> = 64 << 10..=8 << 20;
/// Chunks hold whole pages of the cache.
const CHUNK_BYTES_STEP: u64 = 4096;
const UPLOADS: RangeInclusive<u32> = 1..=256;
/// Requests that take a millisecond are no exception, which a trace is for.
const SLOW_TIMES: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(3600);
/// What the kernel takes as the path of a unix socket, without the final NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

fn refuse(
    key: &'static str,
    value: impl ToString,
    why: impl Into<String>,
    remedy: impl Into<String>,
) -> ConfigError {
    ConfigError::Value {
        place: None,
        key,
        value: value.to_string(),
        why: why.into(),
        remedy: remedy.into(),
    }
}

/// Checks everything but what may still come from flags and variables.
pub(crate) fn check(config: &Config) -> Result<(), ConfigError> {
    check_daemon(config)?;
    check_access(&config.access)?;
    check_nbd(config)?;
    check_store(config)?;
    check_keys(config)?;
    check_cache(config)?;
    check_tracing(&config.tracing)?;

    let threads = config.reactor.threads;
    if !THREADS.contains(&threads) {
        return Err(refuse(
            "reactor.threads",
            threads,
            "it must be 1 to 64",
            "write at most the number of CPUs",
        ));
    }
    let writeback = &config.writeback;
    if writeback.delay > DELAY_MAX {
        let delay = humantime::format_duration(writeback.delay);
        return Err(refuse(
            "writeback.delay",
            delay,
            "it is more than an hour",
            "write \"1h\" or less",
        ));
    }
    if config.reclaim.horizon > HORIZON_MAX {
        let horizon = humantime::format_duration(config.reclaim.horizon);
        let (why, remedy) = ("it is more than 30 days", "write \"15m\" or leave it out");
        return Err(refuse("reclaim.horizon", horizon, why, remedy));
    }
    if !ORPHAN_INTERVALS.contains(&config.reclaim.orphan_interval) {
        let interval = humantime::format_duration(config.reclaim.orphan_interval);
        let (why, remedy) = ("it must be 1s to 365 days", "write \"1d\" or leave it out");
        return Err(refuse("reclaim.orphan_interval", interval, why, remedy));
    }
    let chunk = writeback.chunk_size;
    if !CHUNK_BYTES.contains(&chunk.bytes()) || !chunk.bytes().is_multiple_of(CHUNK_BYTES_STEP) {
        let why = "it must be 64KiB to 8MiB and a multiple of 4KiB";
        return Err(refuse(
            "writeback.chunk_size",
            chunk,
            why,
            "write \"8MiB\" or leave it out",
        ));
    }
    if !UPLOADS.contains(&writeback.uploads_max) {
        return Err(refuse(
            "writeback.uploads_max",
            writeback.uploads_max,
            "it must be 1 to 256",
            "write 8 or leave it out",
        ));
    }
    Ok(())
}

fn check_keys(config: &Config) -> Result<(), ConfigError> {
    let keys = &config.keys;
    let set = [
        ("keys.keyring", keys.keyring.is_some()),
        ("keys.command", keys.command.is_some()),
        ("keys.url", keys.url.is_some()),
    ];
    let mut set = set.iter().filter(|(_, is_set)| *is_set);
    if let (Some((first, _)), Some((second, _))) = (set.next(), set.next()) {
        let why = format!("{first} is set too");
        return Err(refuse(second, "(set)", why, "keep one of them"));
    }
    let has_way = keys.keyring.is_some() || keys.command.is_some() || keys.url.is_some();
    if config.cache.encrypt && config.cache.key.is_none() {
        let why = "cache.key names no key";
        return Err(refuse("cache.encrypt", true, why, "set cache.key"));
    }
    if config.cache.encrypt && !has_way {
        let why = "there is no way to any key";
        let remedy = "set keys.keyring, keys.command or keys.url";
        return Err(refuse("cache.encrypt", true, why, remedy));
    }
    let Some(text) = &keys.url else {
        return Ok(());
    };
    let why = match Url::parse(text) {
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            let why = "a service's URL bears no user or password";
            return Err(refuse("keys.url", "(hidden)", why, "write it without"));
        }
        Ok(url) if url.scheme() == "https" => return Ok(()),
        Ok(url) if url.scheme() == "http" && is_loopback(&url) => return Ok(()),
        Ok(url) if url.scheme() == "http" => "keys would travel in the clear",
        _ => "it is not a URL of a service",
    };
    Err(refuse("keys.url", text, why, "write an https URL"))
}

/// What cannot be read as a URL may have a password in it all the same.
fn without_password(text: &str) -> &str {
    if text.contains('@') { "(hidden)" } else { text }
}

fn check_tracing(tracing: &crate::Tracing) -> Result<(), ConfigError> {
    let slow = tracing.slow;
    if !SLOW_TIMES.contains(&slow) {
        let (why, remedy) = ("it must be 1ms to 1h", "write \"100ms\" or leave it out");
        let slow = humantime::format_duration(slow);
        return Err(refuse("tracing.slow", slow, why, remedy));
    }
    let share = tracing.sample_misses;
    if !(0.0..=1.0).contains(&share) {
        let (why, remedy) = ("it must be 0 to 1", "write a share such as 0.001");
        return Err(refuse("tracing.sample_misses", share, why, remedy));
    }
    let Some(text) = &tracing.endpoint else {
        return Ok(());
    };
    const KEY: &str = "tracing.endpoint";
    const REMEDY: &str = "write a URL such as \"http://127.0.0.1:4318\"";
    let url = Url::parse(text)
        .map_err(|_| refuse(KEY, without_password(text), "it is not a URL", REMEDY))?;
    if !url.username().is_empty() || url.password().is_some() {
        let why = "a collector's URL bears no user or password";
        return Err(refuse(KEY, "(hidden)", why, "use tracing.headers_file"));
    }
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        let why = "it is no http or https URL";
        return Err(refuse(KEY, text, why, REMEDY));
    }
    if url.query().is_some() || url.fragment().is_some() {
        let why = "there is something behind its path";
        return Err(refuse(KEY, "(hidden)", why, REMEDY));
    }
    Ok(())
}

fn check_daemon(config: &Config) -> Result<(), ConfigError> {
    for (key, path) in [
        ("daemon.socket", config.daemon.socket.clone()),
        ("daemon.nbd_socket", config.nbd_socket()),
    ] {
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let why = format!("a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes");
            return Err(refuse(
                key,
                path.display(),
                why,
                "choose a shorter directory, such as one under /run",
            ));
        }
    }
    if config.nbd_socket() == config.daemon.socket {
        let path = config.daemon.socket.display();
        return Err(refuse(
            "daemon.nbd_socket",
            path,
            "it is the control socket too",
            "choose two different paths",
        ));
    }
    if let (Some(a), Some(b)) = (config.daemon.listen, config.daemon.nbd_listen)
        && a == b
        && a.port() != 0
    {
        return Err(refuse(
            "daemon.nbd_listen",
            b,
            "daemon.listen has the same address",
            "choose two different ports",
        ));
    }
    Ok(())
}

fn check_access(access: &crate::Access) -> Result<(), ConfigError> {
    let files = (&access.tls_cert, &access.tls_key);
    if let (Some(path), None) | (None, Some(path)) = files {
        let key = if access.tls_cert.is_some() {
            "access.tls_cert"
        } else {
            "access.tls_key"
        };
        let remedy = "set access.tls_cert and access.tls_key";
        return Err(refuse(key, path.display(), "it is one of two", remedy));
    }
    let Some(address) = access.listen else {
        return Ok(());
    };
    if access.tls_cert.is_none() && !(access.insecure && address.ip().is_loopback()) {
        let why = "there is no certificate, and plain HTTP shows tokens to whoever listens in";
        let remedy = "set access.tls_cert and access.tls_key, or, on loopback, access.insecure";
        return Err(refuse("access.listen", address, why, remedy));
    }
    Ok(())
}

fn check_nbd(config: &Config) -> Result<(), ConfigError> {
    let access = &config.access;
    if let (Some(ca), None) = (&access.nbd_client_ca, &access.tls_cert) {
        let why = "the server's own certificate is not set";
        let remedy = "set access.tls_cert and access.tls_key";
        return Err(refuse("access.nbd_client_ca", ca.display(), why, remedy));
    }
    match config.daemon.nbd_listen {
        Some(address)
            if access.nbd_client_ca.is_none()
                && !access.nbd_insecure
                && !address.ip().is_loopback() =>
        {
            let why = "without TLS whoever reaches it reaches every attached volume";
            let remedy =
                "set access.nbd_client_ca, choose a loopback address, or set access.nbd_insecure";
            Err(refuse("daemon.nbd_listen", address, why, remedy))
        }
        _ => Ok(()),
    }
}

fn check_store(config: &Config) -> Result<(), ConfigError> {
    let store = &config.store;
    if let Some(text) = &store.url {
        check_store_url(text)?;
    }
    if let Some(text) = &store.endpoint {
        let remedy = "write a URL such as \"https://s3.example.com\"";
        let url = Url::parse(text).map_err(|_| {
            refuse(
                "store.endpoint",
                without_password(text),
                "it is not a URL",
                remedy,
            )
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            let why = "an endpoint bears no user or password";
            return Err(refuse(
                "store.endpoint",
                "(hidden)",
                why,
                "use store.access_key and store.secret_key_file",
            ));
        }
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(refuse(
                "store.endpoint",
                text,
                "it is no http or https URL",
                remedy,
            ));
        }
    }
    if store.secret_key.is_some() && store.secret_key_file.is_some() {
        let why = "store.secret_key_file is set too";
        return Err(refuse(
            "store.secret_key",
            "(hidden)",
            why,
            "keep one of the two",
        ));
    }
    if let (Some(source), Some(_)) = (&store.credentials, &store.access_key) {
        let why = "store.access_key is set too";
        return Err(refuse(
            "store.credentials",
            source,
            why,
            "keep one of the two",
        ));
    }
    let has_secret = store.secret_key.is_some() || store.secret_key_file.is_some();
    match &store.access_key {
        Some(id) if !has_secret => {
            let remedy = "set store.secret_key_file, or leave the key out to use AWS_ACCESS_KEY_ID or the machine's role";
            Err(refuse(
                "store.access_key",
                id,
                "its secret is not set",
                remedy,
            ))
        }
        None if has_secret || store.session_token.is_some() => {
            let key = if has_secret {
                "store.secret_key"
            } else {
                "store.session_token"
            };
            Err(refuse(
                key,
                "(hidden)",
                "the id that it belongs to is not set",
                "set store.access_key",
            ))
        }
        _ => Ok(()),
    }
}

fn check_store_url(text: &str) -> Result<(), ConfigError> {
    const KEY: &str = "store.url";
    const REMEDY: &str = "write \"s3://bucket/prefix\" or \"file:///dir\"";
    let url = Url::parse(text)
        .map_err(|_| refuse(KEY, without_password(text), "it is not a URL", REMEDY))?;
    if !url.username().is_empty() || url.password().is_some() {
        let why = "a store's URL bears no user or password";
        return Err(refuse(
            KEY,
            "(hidden)",
            why,
            "use store.access_key and store.secret_key_file",
        ));
    }
    if url.query().is_some() || url.fragment().is_some() || url.port().is_some() {
        return Err(refuse(
            KEY,
            text,
            "it has more than a bucket and a prefix",
            "a server's address goes to store.endpoint",
        ));
    }
    let host = url.host_str().unwrap_or("");
    match url.scheme() {
        "s3" if host.is_empty() => Err(refuse(
            KEY,
            text,
            "it names no bucket",
            "write \"s3://bucket/prefix\"",
        )),
        "s3" => Ok(()),
        "file" if !host.is_empty() => {
            let remedy = "write three slashes and a path from the root: \"file:///dir\"";
            Err(refuse(KEY, text, "a folder has no host", remedy))
        }
        "file" if url.path() == "/" => Err(refuse(
            KEY,
            text,
            "it is the root directory",
            "name a directory of its own",
        )),
        "file" => Ok(()),
        other => Err(refuse(
            KEY,
            text,
            format!("there is no store of the kind `{other}`"),
            REMEDY,
        )),
    }
}

fn check_cache(config: &Config) -> Result<(), ConfigError> {
    let cache = &config.cache;
    if let Some(size) = cache.size
        && size.bytes() < CACHE_BYTES_MIN
    {
        let least = Size::new(CACHE_BYTES_MIN);
        return Err(refuse(
            "cache.size",
            size,
            format!("it is less than {least}"),
            "write \"1GiB\" or more",
        ));
    }
    match cache.dirty_max {
        Bound::Percent(p) if !DIRTY_PERCENT.contains(&p) => {
            let why = "a share must be 1% to 95%, for reads need room too";
            return Err(refuse(
                "cache.dirty_max",
                cache.dirty_max,
                why,
                "write \"70%\" or leave it out",
            ));
        }
        Bound::Size(size) if size.bytes() < DIRTY_BYTES_MIN => {
            let least = Size::new(DIRTY_BYTES_MIN);
            return Err(refuse(
                "cache.dirty_max",
                size,
                format!("it is less than {least}"),
                "write a share such as \"70%\"",
            ));
        }
        Bound::Size(size) if cache.size.is_some_and(|all| size >= all) => {
            let why = "it is not less than cache.size";
            return Err(refuse(
                "cache.dirty_max",
                size,
                why,
                "write a share such as \"70%\", or raise cache.size",
            ));
        }
        Bound::Percent(_) | Bound::Size(_) => {}
    }
    if cache.ram.bytes() < RAM_BYTES_MIN {
        let least = Size::new(RAM_BYTES_MIN);
        return Err(refuse(
            "cache.ram",
            cache.ram,
            format!("it is less than {least}"),
            "write \"64MiB\" or more",
        ));
    }
    Ok(())
}

/// See [`Config::notes`].
pub(crate) fn notes(config: &Config) -> Vec<String> {
    let mut notes = Vec::new();
    if config.store.url.is_none() {
        notes.push("store.url is not set: `quarry serve` will need --store".to_owned());
    }
    if let Some(address) = config.daemon.nbd_listen
        && config.access.nbd_client_ca.is_none()
        && !address.ip().is_loopback()
    {
        notes.push(format!(
            "daemon.nbd_listen = {address} is open to the network: whoever reaches it reaches every attached volume"
        ));
    }
    if let Some(endpoint) = &config.store.endpoint
        && let Ok(url) = Url::parse(endpoint)
        && url.scheme() == "http"
        && !is_loopback(&url)
    {
        notes.push(format!(
            "store.endpoint = {endpoint} is not encrypted: use https outside a private network"
        ));
    }
    if let (Some(endpoint), Some(_)) = (&config.tracing.endpoint, &config.tracing.headers_file)
        && let Ok(url) = Url::parse(endpoint)
        && url.scheme() == "http"
        && !is_loopback(&url)
    {
        notes.push(format!(
            "tracing.endpoint = {endpoint} is not encrypted: the headers of tracing.headers_file travel in the clear"
        ));
    }
    notes
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        Config::parse(text).expect_err(text).to_string()
    }

    #[test]
    fn api_on_the_network_wants_a_certificate() {
        let both = "tls_cert = \"/c\"\ntls_key = \"/k\"";
        let plain = "insecure = true";
        for (address, rest) in [
            ("0.0.0.0:1", both),
            ("127.0.0.1:1", plain),
            ("[::1]:1", plain),
        ] {
            Config::parse(&format!("[access]\nlisten = \"{address}\"\n{rest}")).unwrap();
        }
        for (address, rest, hint) in [
            ("127.0.0.1:1", "", "access.insecure"),
            ("0.0.0.0:1", plain, "there is no certificate"),
            ("0.0.0.0:1", "tls_cert = \"/c\"", "access.tls_key"),
        ] {
            let text = refusal(&format!("[access]\nlisten = \"{address}\"\n{rest}"));
            assert!(text.contains(hint), "{text}");
        }
    }

    #[test]
    fn nbd_on_the_network_wants_certificates() {
        let listen = |address: &str| format!("[daemon]\nnbd_listen = \"{address}\"\n");
        let tls = "[access]\ntls_cert = \"/c\"\ntls_key = \"/k\"\nnbd_client_ca = \"/a\"";
        let open = "[access]\nnbd_insecure = true";
        for (address, rest) in [("127.0.0.1:1", ""), ("0.0.0.0:1", tls), ("0.0.0.0:1", open)] {
            Config::parse(&(listen(address) + rest)).unwrap();
        }
        assert!(refusal(&listen("0.0.0.0:1")).contains("access.nbd_client_ca"));
        let alone = refusal("[access]\nnbd_client_ca = \"/a\"");
        assert!(alone.contains("access.tls_cert"), "{alone}");
    }

    #[test]
    fn store_urls_of_both_kinds_are_taken() {
        for url in [
            "s3://bucket",
            "s3://bucket/a/b",
            "s3://my.bucket_1/",
            "file:///var/store",
            "file:///a%20b",
        ] {
            Config::parse(&format!("[store]\nurl = \"{url}\"")).unwrap();
        }
    }

    #[test]
    fn store_urls_that_lead_nowhere_are_refused() {
        for (url, hint) in [
            ("bucket/prefix", "s3://bucket/prefix"),
            ("s3:///prefix", "names no bucket"),
            ("file://dir/sub", "three slashes"),
            ("file:///", "a directory of its own"),
            ("gs://bucket", "no store of the kind `gs`"),
            ("s3://bucket:9000/x", "store.endpoint"),
        ] {
            let text = refusal(&format!("[store]\nurl = \"{url}\""));
            assert!(
                text.contains(hint) && text.starts_with("line 2: store.url = "),
                "{text}"
            );
        }
        let text = refusal("[store]\nurl = \"s3://id:hunter2@bucket\"");
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[test]
    fn keys_and_secrets_must_come_together() {
        assert!(refusal("[store]\naccess_key = \"a\"").contains("its secret is not set"));
        assert!(refusal("[store]\nsecret_key = \"hunter2\"").contains("set store.access_key"));
        let both = refusal(
            "[store]\naccess_key = \"a\"\nsecret_key = \"hunter2\"\nsecret_key_file = \"/f\"",
        );
        assert!(
            both.contains("keep one") && !both.contains("hunter2"),
            "{both}"
        );
    }

    #[test]
    fn ways_to_keys_are_one_at_most_and_not_in_the_clear() {
        let both = refusal("[keys]\nkeyring = \"/k\"\ncommand = \"/c\"");
        assert!(both.contains("keys.keyring is set too"), "{both}");
        for (url, hint) in [
            ("http://kms.example.com/", "in the clear"),
            ("kms", "not a URL"),
            ("file:///kms", "not a URL"),
        ] {
            let text = refusal(&format!("[keys]\nurl = \"{url}\""));
            assert!(text.contains(hint), "{text}");
        }
        assert!(refusal("[cache]\nencrypt = true").contains("names no key"));
        let nowhere = refusal("[cache]\nencrypt = true\nkey = \"k\"");
        assert!(nowhere.contains("no way to any key"), "{nowhere}");
        for url in ["https://kms.example.com/q", "http://127.0.0.1:8200/"] {
            Config::parse(&format!("[keys]\nurl = \"{url}\"")).unwrap();
        }
    }

    #[test]
    fn cache_bounds_are_held() {
        assert!(refusal("[cache]\nsize = \"1MiB\"").contains("less than 16MiB"));
        assert!(refusal("[cache]\ndirty_max = \"99%\"").contains("1% to 95%"));
        assert!(
            refusal("[cache]\nsize = \"64MiB\"\ndirty_max = \"64MiB\"")
                .contains("not less than cache.size")
        );
        assert!(refusal("[writeback]\nchunk_size = \"9MiB\"").contains("64KiB to 8MiB"));
        assert!(refusal("[writeback]\ndelay = \"2h\"").contains("more than an hour"));
    }

    #[test]
    fn sockets_too_long_or_shared_are_refused() {
        let long = "x".repeat(120);
        assert!(refusal(&format!("[daemon]\nsocket = \"/{long}\"")).contains("at most 107 bytes"));
        assert!(
            refusal("[daemon]\nsocket = \"/a\"\nnbd_socket = \"/a\"")
                .contains("two different paths")
        );
    }

    #[test]
    fn collectors_that_cannot_be_called_are_refused() {
        for (text, hint) in [
            ("endpoint = \"collector\"", "not a URL"),
            (
                "endpoint = \"grpc://collector:4317\"",
                "no http or https URL",
            ),
            (
                "endpoint = \"https://id:hunter2@collector\"",
                "tracing.headers_file",
            ),
            (
                "endpoint = \"https://collector/?key=hunter2\"",
                "behind its path",
            ),
            ("slow = \"0s\"", "1ms to 1h"),
            ("sample_misses = 1.5", "0 to 1"),
        ] {
            let told = refusal(&format!("[tracing]\n{text}"));
            assert!(
                told.contains(hint) && told.starts_with("line 2: "),
                "{told}"
            );
            assert!(!told.contains("hunter2"), "{told}");
        }
        for url in ["http://127.0.0.1:4318", "https://collector/otlp/v1/traces"] {
            Config::parse(&format!("[tracing]\nendpoint = \"{url}\"")).unwrap();
        }
    }

    #[test]
    fn notes_warn_of_what_is_open() {
        let config = Config::parse(
            "[daemon]\nnbd_listen = \"0.0.0.0:10809\"\n[access]\nnbd_insecure = true\n[store]\nendpoint = \"http://10.0.0.1\"\n\
             [tracing]\nendpoint = \"http://10.0.0.2:4318\"\nheaders_file = \"/h\"",
        )
        .unwrap();
        assert_eq!(config.notes().len(), 4, "{:?}", config.notes());
        let quiet = "[daemon]\nnbd_listen = \"127.0.0.1:1\"\n[store]\nurl = \"file:///d\"\nendpoint = \"http://localhost:1\"";
        assert!(Config::parse(quiet).unwrap().notes().is_empty());
    }
}
