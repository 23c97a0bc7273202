//! The flags that say what a tenant may have, and what they make of its settings.

use clap::Args;
use quarry_config::Size;
use serde_json::{Map, Value, json};

use super::limit::bandwidth;

/// A limit: `none` takes it away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// No limit.
    None,
    /// So much.
    Of(u64),
}

fn count(text: &str) -> Result<Limit, String> {
    limit(text, |text| {
        text.parse()
            .map_err(|_| "write a whole number, or none".to_owned())
    })
}

fn bytes(text: &str) -> Result<Limit, String> {
    limit(text, |text| {
        let size = text.parse::<Size>().map_err(|error| error.to_string())?;
        Ok(size.bytes())
    })
}

/// Bytes a second, with or without saying so.
fn rate(text: &str) -> Result<Limit, String> {
    limit(text, |text| bandwidth(text).map(Size::bytes))
}

fn limit(text: &str, parse: impl Fn(&str) -> Result<u64, String>) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit::None),
        text => parse(text).map(Limit::Of),
    }
}

/// What a tenant may have.
#[derive(Clone, Default, Debug, Args)]
pub struct TenantArgs {
    /// Bytes of its volumes, all together.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    max_bytes: Option<Limit>,
    /// Bytes in the store, from which on nothing more is made for it.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    max_stored_bytes: Option<Limit>,
    /// Volumes.
    #[arg(long, value_name = "N", value_parser = count)]
    max_volumes: Option<Limit>,
    /// Snapshots, all together.
    #[arg(long, value_name = "N", value_parser = count)]
    max_snapshots: Option<Limit>,
    /// Requests a second of all its volumes on a host.
    #[arg(long, value_name = "N", value_parser = count)]
    iops: Option<Limit>,
    /// Requests at once after a rest; by default a tenth of a second's.
    #[arg(long, value_name = "N", value_parser = count)]
    iops_burst: Option<Limit>,
    /// Bytes a second of all its volumes on a host, such as 500MiB/s.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bandwidth: Option<Limit>,
    /// Bytes at once after a rest; by default a tenth of a second's.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    bandwidth_burst: Option<Limit>,
    /// Its share beside others' where several want more than there is; by default 100.
    #[arg(long, value_name = "N", value_parser = count)]
    weight: Option<Limit>,
    /// Bytes of each host's cache that no other takes from it.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    cache_reserve: Option<Limit>,
    /// Bytes of each host's cache that it takes at most.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    cache_max: Option<Limit>,
    /// Of these, bytes that its store lacks.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    dirty_max: Option<Limit>,
    /// The name of the key that its new volumes are encrypted under; `none`: they are not.
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// A store of its own: s3://bucket/prefix or file:///dir; `none`: the daemon's. Only while it has no volumes.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// URL of its S3 server; by default the one of the daemon's store.
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// Region of its bucket; by default the one of the daemon's store.
    #[arg(long, value_name = "REGION")]
    region: Option<String>,
    /// Who the daemon asks for the keys to its bucket: profile:NAME, environment, web-identity or instance-metadata; by
    /// default as for its own.
    #[arg(long, value_name = "SOURCE")]
    credentials: Option<String>,
}

impl TenantArgs {
    /// As a JSON merge patch of the settings.
    pub fn patch(&self) -> Map<String, Value> {
        let limits = [
            ("provisioned_bytes_max", self.max_bytes),
            ("stored_bytes_max", self.max_stored_bytes),
            ("volumes_max", self.max_volumes),
            ("snapshots_max", self.max_snapshots),
            ("weight", self.weight),
            ("cache_reserve_bytes", self.cache_reserve),
            ("cache_bytes_max", self.cache_max),
            ("dirty_bytes_max", self.dirty_max),
        ];
        let rates = [
            ("iops", self.iops),
            ("iops_burst", self.iops_burst),
            ("bandwidth_bytes", self.bandwidth),
            ("bandwidth_burst_bytes", self.bandwidth_burst),
        ];
        let mut patch = limits_of(limits);
        let rates = limits_of(rates);
        if !rates.is_empty() {
            patch.insert("rates".to_owned(), Value::Object(rates));
        }
        patch.extend(texts_of([("key", &self.key)]));
        let mut store = texts_of([
            ("endpoint", &self.endpoint),
            ("region", &self.region),
            ("credentials", &self.credentials),
        ]);
        match self.store.as_deref() {
            Some("none") => {
                patch.insert("store".to_owned(), Value::Null);
                return patch;
            }
            Some(url) => {
                store.insert("url".to_owned(), json!(url));
            }
            None => {}
        }
        if !store.is_empty() {
            patch.insert("store".to_owned(), Value::Object(store));
        }
        patch
    }
}

fn limits_of<const N: usize>(limits: [(&str, Option<Limit>); N]) -> Map<String, Value> {
    let field = |(name, limit): (&str, Option<Limit>)| {
        let value = match limit? {
            Limit::None => Value::Null,
            Limit::Of(value) => json!(value),
        };
        Some((name.to_owned(), value))
    };
    limits.into_iter().filter_map(field).collect()
}

fn texts_of<const N: usize>(texts: [(&str, &Option<String>); N]) -> Map<String, Value> {
    let field = |(name, text): (&str, &Option<String>)| {
        let value = match text.as_deref()? {
            "none" => Value::Null,
            text => json!(text),
        };
        Some((name.to_owned(), value))
    };
    texts.into_iter().filter_map(field).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        settings: TenantArgs,
    }

    fn patch(line: &str) -> Value {
        let words = std::iter::once("x").chain(line.split_whitespace());
        Value::Object(Alone::try_parse_from(words).unwrap().settings.patch())
    }

    #[test]
    fn flags_become_a_patch_of_what_they_name() {
        assert_eq!(patch(""), json!({}));
        let all = patch(
            "--max-bytes 10TiB --max-volumes 50 --iops 20000 --bandwidth 500MiB/s --cache-reserve 10GiB --cache-max 40GiB",
        );
        let wanted = json!({
            "provisioned_bytes_max": 10u64 << 40, "volumes_max": 50,
            "rates": {"iops": 20_000, "bandwidth_bytes": 500u64 << 20},
            "cache_reserve_bytes": 10u64 << 30, "cache_bytes_max": 40u64 << 30,
        });
        assert_eq!(all, wanted);
        let none = patch("--iops none --key none --store none --region r");
        assert_eq!(
            none,
            json!({"rates": {"iops": null}, "key": null, "store": null})
        );
        let store = patch("--store s3://b/p --credentials profile:acme");
        assert_eq!(
            store,
            json!({"store": {"url": "s3://b/p", "credentials": "profile:acme"}})
        );
    }

    #[test]
    fn flag_that_is_no_size_is_refused() {
        assert!(Alone::try_parse_from(["x", "--max-bytes", "many"]).is_err());
        assert!(Alone::try_parse_from(["x", "--iops", "-1"]).is_err());
    }
}
