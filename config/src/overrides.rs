//! What wins over the file (flags) and what stands in for it (the `AWS_*` variables).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::read::{read_small, unreadable};
use crate::{Config, ConfigError, Secret, Size, validate};

/// The flags of `quarry serve`; what is set here wins over the file.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Overrides {
    /// `--data-dir`
    pub data_dir: Option<PathBuf>,
    /// `--store`
    pub store_url: Option<String>,
    /// `--cache`
    pub cache_path: Option<PathBuf>,
    /// `--cache-size`
    pub cache_size: Option<Size>,
    /// `--socket`
    pub socket: Option<PathBuf>,
    /// `--listen`
    pub listen: Option<SocketAddr>,
    /// `--nbd-listen`
    pub nbd_listen: Option<SocketAddr>,
    /// `--journal-dir`
    pub journal_dir: Option<PathBuf>,
}

impl Config {
    /// Puts flags over and variables under what the file says, reads the secret key's file, and
    /// checks the whole: what comes back is ready to serve. `env` looks a variable up.
    ///
    /// Credentials are never mixed: with `store.access_key` in the file, no credential variable is read.
    ///
    /// # Errors
    /// The first value that is missing or outside its limits.
    pub fn complete(
        mut self,
        flags: Overrides,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        self.apply(flags);
        let var = |names: &[&str]| {
            names
                .iter()
                .find_map(|name| env(name).filter(|v| !v.is_empty()))
        };
        let store = &mut self.store;
        if store.endpoint.is_none() {
            store.endpoint = var(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]);
        }
        if store.region.is_none() {
            store.region = var(&["AWS_REGION", "AWS_DEFAULT_REGION"]);
        }
        let has_own = store.access_key.is_some()
            || store.secret_key.is_some()
            || store.secret_key_file.is_some()
            || store.session_token.is_some()
            || store.credentials.is_some();
        if !has_own {
            store.access_key = var(&["AWS_ACCESS_KEY_ID"]);
            store.secret_key = var(&["AWS_SECRET_ACCESS_KEY"]).map(Secret::new);
            store.session_token = var(&["AWS_SESSION_TOKEN"]).map(Secret::new);
        }
        let tracing = &mut self.tracing;
        if tracing.endpoint.is_none() && var(&["OTEL_SDK_DISABLED"]).as_deref() != Some("true") {
            tracing.endpoint = var(&[
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                "OTEL_EXPORTER_OTLP_ENDPOINT",
            ]);
        }
        if tracing.service_name == crate::Tracing::default().service_name
            && let Some(name) = var(&["OTEL_SERVICE_NAME"])
        {
            tracing.service_name = name;
        }
        if let Some(attributes) = var(&["OTEL_RESOURCE_ATTRIBUTES"]) {
            tracing.resource = resource_attributes(&attributes);
        }
        validate::check(&self)?;
        if self.store.url.is_none() {
            return Err(ConfigError::Missing {
                key: "store.url",
                remedy: "name the object store with --store s3://bucket/prefix or --store file:///dir, or in the file",
            });
        }
        if let Some(path) = self.store.secret_key_file.take() {
            self.store.secret_key = Some(read_secret(&path)?);
        }
        Ok(self)
    }

    fn apply(&mut self, flags: Overrides) {
        // A flag's relative path starts where the command was typed.
        let here = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let Overrides {
            data_dir,
            store_url,
            cache_path,
            cache_size,
            socket,
            listen,
            nbd_listen,
            journal_dir,
        } = flags;
        if let Some(path) = data_dir {
            self.daemon.data_dir = here(path);
        }
        if let Some(url) = store_url {
            self.store.url = Some(url);
        }
        if let Some(path) = cache_path {
            self.cache.path = Some(here(path));
        }
        if let Some(path) = socket {
            self.daemon.socket = here(path);
        }
        self.cache.size = cache_size.or(self.cache.size);
        self.daemon.listen = listen.or(self.daemon.listen);
        self.daemon.nbd_listen = nbd_listen.or(self.daemon.nbd_listen);
        if let Some(path) = journal_dir {
            self.daemon.journal_dir = here(path);
        }
    }
}

/// `name=value,…`, values percent-encoded; what is not of this form is left out, as OpenTelemetry has it.
fn resource_attributes(text: &str) -> Vec<(String, String)> {
    let pairs = text.split(',').filter_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        let value = percent_decoded(value.trim())?;
        Some((name.trim().to_owned(), value))
    });
    pairs.filter(|(name, _)| !name.is_empty()).collect()
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next()?, rest.next()?];
        let digits = std::str::from_utf8(&digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

fn read_secret(path: &Path) -> Result<Secret, ConfigError> {
    let text = read_small(path).map_err(|source| unreadable("the secret key", path, source))?;
    let secret = text.trim();
    if secret.is_empty() || secret.lines().count() != 1 {
        return Err(ConfigError::Value {
            place: None,
            key: "store.secret_key_file",
            value: path.display().to_string(),
            why: "the file must hold one line, the secret".to_owned(),
            remedy: "write the secret and nothing else into it".to_owned(),
        });
    }
    Ok(Secret::new(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(
        pairs: &'static [(&'static str, &'static str)],
    ) -> impl Fn(&str) -> Option<String> {
        move |name| {
            pairs
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        }
    }

    const AWS: &[(&str, &str)] = &[
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:8333"),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ACCESS_KEY_ID", "env-id"),
        ("AWS_SECRET_ACCESS_KEY", "env-secret"),
        ("AWS_SESSION_TOKEN", "env-token"),
    ];

    #[test]
    fn flags_win_over_the_file() {
        let file = Config::parse(
            "[daemon]\ndata_dir = \"/f\"\nsocket = \"/f/s\"\n[store]\nurl = \"s3://f\"\n[cache]\nsize = \"1GiB\"\nram = \"32MiB\"",
        )
        .unwrap();
        let flags = Overrides {
            data_dir: Some("rel".into()),
            store_url: Some("file:///flag".to_owned()),
            cache_path: Some("/flag/cache".into()),
            cache_size: Some(Size::new(2 << 30)),
            socket: Some("/flag/s".into()),
            listen: Some("127.0.0.1:1".parse().unwrap()),
            nbd_listen: Some("127.0.0.1:2".parse().unwrap()),
            journal_dir: Some("/flag/journal".into()),
        };
        let config = file.complete(flags, |_| None).unwrap();
        assert_eq!(
            config.daemon.data_dir,
            std::env::current_dir().unwrap().join("rel")
        );
        assert_eq!(config.store.url.as_deref(), Some("file:///flag"));
        assert_eq!(config.cache_path(), PathBuf::from("/flag/cache"));
        assert_eq!(config.cache.size, Some(Size::new(2 << 30)));
        assert_eq!(config.cache.ram, Size::new(32 << 20));
        assert_eq!(config.daemon.socket, PathBuf::from("/flag/s"));
        assert_eq!(config.daemon.journal_dir, PathBuf::from("/flag/journal"));
    }

    #[test]
    fn variables_fill_what_the_file_leaves_out() {
        let config = Config::parse("[store]\nurl = \"s3://b\"\nregion = \"file-region\"").unwrap();
        let store = config
            .complete(Overrides::default(), variables(AWS))
            .unwrap()
            .store;
        assert_eq!(store.endpoint.as_deref(), Some("http://127.0.0.1:8333"));
        assert_eq!(store.region.as_deref(), Some("file-region"));
        assert_eq!(store.access_key.as_deref(), Some("env-id"));
        assert_eq!(
            store.secret_key.as_ref().map(Secret::expose),
            Some("env-secret")
        );
        assert!(store.uses_path_style());
    }

    #[test]
    fn credentials_of_the_file_are_never_mixed_with_variables() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, "file-secret\n").unwrap();
        let text = format!(
            "[store]\nurl = \"s3://b\"\naccess_key = \"file-id\"\nsecret_key_file = {file:?}"
        );
        let store = Config::parse(&text)
            .unwrap()
            .complete(Overrides::default(), variables(AWS))
            .unwrap()
            .store;
        assert_eq!(store.access_key.as_deref(), Some("file-id"));
        assert_eq!(
            store.secret_key.as_ref().map(Secret::expose),
            Some("file-secret")
        );
        assert_eq!(store.session_token, None);
    }

    #[test]
    fn secret_file_missing_or_empty_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        let text =
            format!("[store]\nurl = \"s3://b\"\naccess_key = \"id\"\nsecret_key_file = {file:?}");
        let complete = || {
            Config::parse(&text)
                .unwrap()
                .complete(Overrides::default(), |_| None)
        };
        assert!(matches!(complete(), Err(ConfigError::Read { .. })));
        std::fs::write(&file, " \n").unwrap();
        assert!(complete().unwrap_err().to_string().contains("nothing else"));
    }

    #[test]
    fn store_unset_everywhere_is_refused_with_the_flag_to_use() {
        let text = Config::default()
            .complete(Overrides::default(), |_| None)
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with("store.url is not set; ") && text.contains("--store"),
            "{text}"
        );
    }

    #[test]
    fn flag_outside_its_limits_is_refused() {
        let flags = Overrides {
            cache_size: Some(Size::new(1)),
            store_url: Some("file:///d".into()),
            ..Overrides::default()
        };
        assert!(Config::default().complete(flags, |_| None).is_err());
    }

    #[test]
    fn standard_variables_name_the_collector_where_the_file_does_not() {
        let env = variables(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318"),
            ("OTEL_SERVICE_NAME", "blocks"),
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "deployment.environment.name=a%20b,nonsense, rack = 7 ,=x,y=%zz",
            ),
        ]);
        let complete = |text: &str| {
            let config = Config::parse(&format!("[store]\nurl = \"s3://b\"\n{text}")).unwrap();
            config.complete(Overrides::default(), &env).unwrap().tracing
        };
        let tracing = complete("");
        assert_eq!(tracing.endpoint.as_deref(), Some("http://127.0.0.1:4318"));
        assert_eq!(tracing.service_name, "blocks");
        let resource = [("deployment.environment.name", "a b"), ("rack", "7")];
        let resource = resource.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(tracing.resource, resource);
        let own = complete("[tracing]\nendpoint = \"https://own\"\nservice_name = \"mine\"");
        assert_eq!(own.endpoint.as_deref(), Some("https://own"));
        assert_eq!(own.service_name, "mine");
        let off = variables(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318"),
            ("OTEL_SDK_DISABLED", "true"),
        ]);
        let config = Config::parse("[store]\nurl = \"s3://b\"").unwrap();
        let config = config.complete(Overrides::default(), off).unwrap();
        assert_eq!(config.tracing.endpoint, None);
    }
}
