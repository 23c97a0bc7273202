//! What a storage class says: parameters of the volumes that are made by it, and what their nodes are to know.

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr;

use quarry_config::Size;
use quarry_csi_proto::v1::CapacityRange;
use quarry_objfmt::{Compression, Durability, KeyName, TenantName, VolumeName};
use tonic::Status;

use super::answer::Answer;
use crate::control::dto::{SECTOR_SIZES, VOLUME_BYTES_MAX};
use crate::control::{AttachOptions, RatesSpec, Via, VolumeInfo, VolumeSpec};

/// What a volume gets if nobody says how large it is to be.
const SIZE_DEFAULT: u64 = 1 << 30;
/// Sizes are whole numbers of these, which are whole sectors of every size.
const SIZE_STEP: u64 = 4096;

/// What Kubernetes' own parameters begin with; they are for its parts.
const KUBERNETES: &str = "csi.storage.k8s.io/";

/// Parameters that pass to the node as they are, with the volume's context.
const QUEUES: &str = "queues";
const DIRECT_READS: &str = "directReads";
const KEEP_UNSENT: &str = "keepUnsent";

/// Where nodes and volumes are: keys and their segments.
pub type Topology = BTreeMap<String, String>;

/// A storage class. What is not said is as the API has it.
#[derive(Debug)]
pub(super) struct Class {
    pub tenant: TenantName,
    sector_size: Option<u32>,
    durability: Option<Durability>,
    compression: Option<Compression>,
    retain_ms: Option<u64>,
    rates: RatesSpec,
    key: Option<KeyName>,
    no_encryption: bool,
    /// The volume's context.
    pub context: HashMap<String, String>,
}

impl Class {
    /// Of a class's parameters.
    ///
    /// # Errors
    /// If one of them is unknown or wrong, or there is no tenant.
    pub fn parse(parameters: &HashMap<String, String>) -> Answer<Self> {
        let tenant = parameters
            .get("tenant")
            .ok_or_else(|| Status::invalid_argument("the class names no tenant"))?;
        let mut class = Self {
            tenant: value("tenant", tenant)?,
            sector_size: None,
            durability: None,
            compression: None,
            retain_ms: None,
            rates: RatesSpec::default(),
            key: None,
            no_encryption: false,
            context: HashMap::new(),
        };
        for (name, text) in parameters {
            match name.as_str() {
                "tenant" => {}
                "sectorSize" => {
                    let size = value(name, text)?;
                    if !SECTOR_SIZES.contains(&size) {
                        return Err(wrong(name, text));
                    }
                    class.sector_size = Some(size);
                }
                "durability" => class.durability = Some(word(name, text)?),
                "compression" => class.compression = Some(value(name, text)?),
                "retain" => {
                    let span = humantime::parse_duration(text).map_err(|_| wrong(name, text))?;
                    let ms = u64::try_from(span.as_millis()).map_err(|_| wrong(name, text))?;
                    class.retain_ms = Some(ms);
                }
                "iops" => class.rates.iops = Some(value(name, text)?),
                "bandwidth" => {
                    let size: Size = value(name, text.strip_suffix("/s").unwrap_or(text))?;
                    class.rates.bandwidth_bytes = Some(size.bytes());
                }
                "key" => class.key = Some(value(name, text)?),
                "encryption" if text == "none" => class.no_encryption = true,
                QUEUES | DIRECT_READS | KEEP_UNSENT => {
                    class.context.insert(name.clone(), text.clone());
                }
                name if name.starts_with(KUBERNETES) => {}
                "encryption" => return Err(wrong(name, text)),
                _ => {
                    let message = format!("the class has the parameter {name:?}, which is unknown");
                    return Err(Status::invalid_argument(message));
                }
            }
        }
        options(&class.context, false)?;
        keeps_unsent(&class.context)?;
        Ok(class)
    }

    /// What makes an empty volume of it.
    pub fn spec(&self, name: VolumeName, size_bytes: u64) -> VolumeSpec {
        VolumeSpec {
            tenant: self.tenant.clone(),
            name,
            size_bytes,
            sector_size: self.sector_size.unwrap_or(SECTOR_SIZES[0]),
            durability: self.durability.unwrap_or_default(),
            compression: self.compression.unwrap_or_default(),
            retain_ms: self.retain_ms.unwrap_or_default(),
            rates: self.rates,
            key: self.key.clone(),
            no_encryption: self.no_encryption,
        }
    }

    /// What it says that a volume, which cannot be changed in that any more, is not.
    pub fn differs(&self, volume: &VolumeInfo) -> Option<String> {
        let differs = |what: &str, has: &dyn std::fmt::Display| {
            Some(format!(
                "the volume's {what} is {has}, and the class has another"
            ))
        };
        let is_other = |wish: Option<&str>, has: &str| wish.is_some_and(|wish| wish != has);
        let durability = text(&volume.durability);
        if self
            .sector_size
            .is_some_and(|size| size != volume.sector_size)
        {
            return differs("sector size", &volume.sector_size);
        }
        if is_other(self.durability.as_ref().map(text).as_deref(), &durability) {
            return differs("durability", &durability);
        }
        let compression = text(&volume.compression);
        if is_other(self.compression.as_ref().map(text).as_deref(), &compression) {
            return differs("compression", &compression);
        }
        if self.no_encryption && volume.key.is_some() {
            return Some("the volume is encrypted".to_owned());
        }
        if self.key.is_some() && volume.key.is_none() {
            return Some("the volume is not encrypted".to_owned());
        }
        None
    }

    /// How fast volumes may be used, if it says so.
    pub fn rates(&self) -> Option<RatesSpec> {
        Some(self.rates).filter(|rates| *rates != RatesSpec::default())
    }

    /// How long volumes' past is kept, if it says so.
    pub const fn retain_ms(&self) -> Option<u64> {
        self.retain_ms
    }
}

/// How a node attaches a volume with this context.
///
/// # Errors
/// If something of it is wrong.
pub(super) fn options(context: &HashMap<String, String>, read_only: bool) -> Answer<AttachOptions> {
    let said = |name: &str| context.get(name).map(String::as_str);
    let queues = said(QUEUES).map(|text| value(QUEUES, text)).transpose()?;
    Ok(AttachOptions {
        via: Some(Via::Ublk),
        read_only,
        queues,
        direct_reads: switch(context, DIRECT_READS)?,
        ..AttachOptions::default()
    })
}

/// Whether a node that had the volume before keeps what it may not have sent then, and is refused the volume as
/// long as it does.
///
/// # Errors
/// If that is said in other words than `true` and `false`.
pub(super) fn keeps_unsent(context: &HashMap<String, String>) -> Answer<bool> {
    switch(context, KEEP_UNSENT)
}

fn switch(context: &HashMap<String, String>, name: &str) -> Answer<bool> {
    context
        .get(name)
        .map_or(Ok(false), |text| value(name, text))
}

fn wrong(name: &str, text: &str) -> Status {
    Status::invalid_argument(format!("the parameter {name} cannot be {text:?}"))
}

fn value<T: FromStr>(name: &str, text: &str) -> Answer<T> {
    text.parse().map_err(|_| wrong(name, text))
}

/// One of the API's words.
fn word<T: serde::de::DeserializeOwned>(name: &str, text: &str) -> Answer<T> {
    serde_json::from_value(text.into()).map_err(|_| wrong(name, text))
}

fn text<T: serde::Serialize>(word: &T) -> String {
    let word = serde_json::to_value(word).unwrap_or_default();
    word.as_str().unwrap_or_default().to_owned()
}

/// A size that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Wanted {
    /// So many bytes at least; 0: it was not said.
    pub required: u64,
    /// So many at most.
    limit: Option<u64>,
}

impl Wanted {
    /// Of a request.
    ///
    /// # Errors
    /// If nothing is so large.
    pub fn of(range: Option<&CapacityRange>) -> Answer<Self> {
        let range = range.copied().unwrap_or_default();
        let bytes = |bytes: i64| {
            u64::try_from(bytes).map_err(|_| Status::invalid_argument("a capacity is negative"))
        };
        let (required, limit) = (bytes(range.required_bytes)?, bytes(range.limit_bytes)?);
        let limit = Some(limit).filter(|limit| *limit > 0);
        if limit.is_some_and(|limit| limit < required) {
            let message = "the capacity's limit is less than what is required";
            return Err(Status::invalid_argument(message));
        }
        Ok(Self { required, limit })
    }

    /// The size to make, `source` bytes at least.
    ///
    /// # Errors
    /// If no volume can have it.
    pub fn size(self, source: u64) -> Answer<u64> {
        let least = self.required.max(source);
        let size = match (least, self.limit) {
            (0, Some(limit)) => limit.min(SIZE_DEFAULT) / SIZE_STEP * SIZE_STEP,
            (0, None) => SIZE_DEFAULT,
            (least, _) => least
                .checked_next_multiple_of(SIZE_STEP)
                .unwrap_or(u64::MAX),
        };
        if size == 0 || size > VOLUME_BYTES_MAX {
            let message = format!(
                "a volume has {SIZE_STEP} to {VOLUME_BYTES_MAX} bytes, and {least} are required"
            );
            return Err(Status::out_of_range(message));
        }
        self.within_limit(size)?;
        Ok(size)
    }

    /// Refuses a size that is too large.
    ///
    /// # Errors
    /// If it is.
    pub fn within_limit(self, size: u64) -> Answer<()> {
        match self.limit {
            Some(limit) if size > limit => {
                let message = format!("the volume has {size} bytes, and {limit} are the limit");
                Err(Status::out_of_range(message))
            }
            _ => Ok(()),
        }
    }
}

/// A size, as CSI has it.
pub(super) fn bytes(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn class(parameters: &[(&str, &str)]) -> Answer<Class> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Class::parse(&parameters.iter().map(owned).collect())
    }

    #[test]
    fn class_becomes_a_spec_and_a_context() {
        let class = class(&[
            ("tenant", "acme"),
            ("sectorSize", "4096"),
            ("durability", "object"),
            ("compression", "zstd"),
            ("retain", "1h"),
            ("iops", "500"),
            ("bandwidth", "200MiB/s"),
            ("key", "acme-2026"),
            ("queues", "4"),
            ("csi.storage.k8s.io/pvc/name", "data"),
        ])
        .unwrap();
        let spec = class.spec("db".parse().unwrap(), 8192);
        assert_eq!((spec.sector_size, spec.retain_ms), (4096, 3_600_000));
        assert_eq!(spec.durability, Durability::Object);
        assert_eq!(spec.compression, Compression::Zstd);
        assert_eq!(spec.rates.iops, Some(500));
        assert_eq!(spec.rates.bandwidth_bytes, Some(200 << 20));
        assert_eq!(options(&class.context, false).unwrap().queues, Some(4));
        assert_eq!(class.context.len(), 1);
    }

    #[test]
    fn class_that_says_something_wrong_or_unknown_is_refused() {
        for wrong in [
            &[][..],
            &[("tenant", "../acme")],
            &[("tenant", "acme"), ("sectorSize", "520")],
            &[("tenant", "acme"), ("durability", "somewhere")],
            &[("tenant", "acme"), ("compression", "zip")],
            &[("tenant", "acme"), ("encryption", "aes")],
            &[("tenant", "acme"), ("queues", "many")],
            &[("tenant", "acme"), ("keepUnsent", "yes")],
            &[("tenant", "acme"), ("tennant", "acme")],
        ] {
            assert_eq!(
                class(wrong).unwrap_err().code(),
                Code::InvalidArgument,
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn class_differs_from_a_volume_in_what_was_said_only() {
        let volume = VolumeInfo {
            sector_size: 512,
            compression: Compression::Zstd,
            ..VolumeInfo::default()
        };
        let differs = |more: &[(&str, &str)]| {
            let all = [&[("tenant", "acme")], more].concat();
            class(&all).unwrap().differs(&volume)
        };
        assert_eq!(differs(&[]), None);
        assert_eq!(
            differs(&[("sectorSize", "512"), ("compression", "zstd")]),
            None
        );
        assert!(differs(&[("compression", "lz4")]).unwrap().contains("zstd"));
        assert!(
            differs(&[("durability", "object")])
                .unwrap()
                .contains("local")
        );
        assert!(differs(&[("key", "k")]).is_some());
    }

    #[test]
    fn size_is_what_was_asked_for_in_whole_steps_or_out_of_range() {
        let wanted = |required_bytes, limit_bytes| {
            let range = CapacityRange {
                required_bytes,
                limit_bytes,
            };
            Wanted::of(Some(&range)).and_then(|wanted| wanted.size(0))
        };
        assert_eq!(Wanted::of(None).unwrap().size(0).unwrap(), SIZE_DEFAULT);
        assert_eq!(wanted(1, 0).unwrap(), 4096);
        assert_eq!(wanted(5000, 8192).unwrap(), 8192);
        assert_eq!(wanted(0, 10_000).unwrap(), 8192);
        assert_eq!(wanted(1 << 60, 0).unwrap(), 1 << 60);
        for (required, limit) in [((1 << 60) + 1, 0), (i64::MAX, 0), (5000, 5001), (0, 100)] {
            assert_eq!(
                wanted(required, limit).unwrap_err().code(),
                Code::OutOfRange
            );
        }
        for (required, limit) in [(-1, 0), (0, -1), (2, 1)] {
            assert_eq!(
                wanted(required, limit).unwrap_err().code(),
                Code::InvalidArgument
            );
        }
        let range = CapacityRange {
            required_bytes: 100,
            limit_bytes: 0,
        };
        assert_eq!(
            Wanted::of(Some(&range)).unwrap().size(12_288).unwrap(),
            12_288
        );
    }
}
