//! Tenants over the wire and at their routes: what they may have, have, and did.

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::StatusCode;
use axum::response::Json;
use quarry_objfmt::{Suspended, TenantName, TenantSettings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::access::Allowed;
use super::api::{Body, Made, Query, Refused, json, make, not_utf8, query, whole};
use super::openapi::{Name, SuspendedWord};
use super::page::{PageQuery, listed, page};
use super::rates::RatesSpec;
use super::{ApiError, ApiResult, StoreStatus};
use crate::store::{CredentialSource, StoreSettings};

/// The most that a weight may be: one tenant's share is at most so many times another's.
const WEIGHT_MAX: u32 = 10_000;

/// The slowest bandwidth that can be set: less than this a second would hold up a single request for long.
const BANDWIDTH_BYTES_MIN: u64 = 64 << 10;

/// Request: make a tenant.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantSpec {
    /// Its name.
    #[schemars(with = "Name")]
    pub name: TenantName,
    /// What it may have.
    #[schemars(with = "SettingsDoc")]
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub settings: TenantSettings,
}

impl From<TenantName> for TenantSpec {
    fn from(name: TenantName) -> Self {
        let settings = TenantSettings::default();
        Self { name, settings }
    }
}

fn is_nothing(settings: &TenantSettings) -> bool {
    *settings == TenantSettings::default()
}

/// Request: hold a tenant's volumes up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuspendSpec {
    /// How.
    #[schemars(with = "SuspendedWord")]
    pub how: Suspended,
}

/// A tenant.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TenantInfo {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created_ms: u64,
    /// What it may have.
    #[schemars(with = "SettingsDoc")]
    pub settings: TenantSettings,
    /// Its store, as this host sees it; in a list it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreStatus>,
    /// What it has; in a list it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<TenantUsage>,
    /// What it asked of its store from this host, since the daemon started; in a list it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<StoreRequests>,
}

/// What a tenant has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TenantUsage {
    /// Volumes, those in the trash not counted.
    pub volumes: u64,
    /// Snapshots of them.
    pub snapshots: u64,
    /// Their sizes, all together.
    pub provisioned_bytes: u64,
    /// Bytes of its objects in the store, those in the trash counted.
    pub stored_bytes: u64,
}

/// Requests to a store, and what they cost by `[prices]` in the configuration.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct StoreRequests {
    /// Objects written.
    pub puts: u64,
    /// Objects read, or parts of them.
    pub gets: u64,
    /// Listings, by pages as far as known.
    pub lists: u64,
    /// Objects deleted.
    pub deletes: u64,
    /// Bytes received.
    pub read_bytes: u64,
    /// Bytes sent.
    pub written_bytes: u64,
    /// What that cost, in the configuration's currency.
    pub cost: f64,
}

impl StoreRequests {
    /// All of them.
    pub(crate) const fn count(&self) -> u64 {
        self.puts + self.gets + self.lists + self.deletes
    }

    /// What they cost, in millionths.
    pub(crate) fn cost_micros(&self) -> u64 {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a cost is not negative, and what does not fit is cut"
        )]
        let micros = (self.cost * 1e6).round() as u64;
        micros
    }
}

/// Answer: all tenants.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct TenantList {
    /// By name.
    pub tenants: Vec<TenantInfo>,
    /// What to ask for the next page after; none: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

listed!(TenantList, tenants);

/// [`TenantSettings`], for the API's document; to change them, what is null takes a limit away.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "TenantSettings")]
#[derive(Default)]
#[allow(dead_code, reason = "it is described, never made")]
pub(super) struct SettingsDoc {
    /// Where its volumes are; none: in the daemon's own store.
    store: Option<StoreDoc>,
    /// Sizes of its volumes, all together, in bytes.
    provisioned_bytes_max: Option<u64>,
    /// Bytes of its objects in the store, from which on nothing more is made for it.
    stored_bytes_max: Option<u64>,
    /// Volumes, those in the trash not counted.
    volumes_max: Option<u64>,
    /// Snapshots of all its volumes.
    snapshots_max: Option<u64>,
    /// What all its volumes on one host may do together.
    rates: Option<RatesSpec>,
    /// Its share beside others'; 100 if it is not set.
    #[schemars(range(min = 1, max = 10_000))]
    weight: Option<u32>,
    /// Bytes of each host's cache that no other tenant takes from it.
    cache_reserve_bytes: Option<u64>,
    /// Bytes of each host's cache that it takes at most.
    cache_bytes_max: Option<u64>,
    /// Of these, bytes that its store lacks.
    dirty_bytes_max: Option<u64>,
    /// The name of the key that its new volumes are encrypted under.
    #[schemars(with = "Option<Name>")]
    key: Option<String>,
    /// How its volumes are held up.
    #[schemars(with = "Option<SuspendedWord>")]
    suspended: Option<Suspended>,
}

/// [`quarry_objfmt::TenantStore`], for the API's document.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "TenantStore")]
#[derive(Default)]
#[allow(dead_code, reason = "it is described, never made")]
struct StoreDoc {
    /// `s3://bucket/prefix` or `file:///dir`.
    url: String,
    /// URL of its S3 server; none: that of the daemon's store.
    endpoint: Option<String>,
    /// Region of its bucket; none: that of the daemon's store.
    region: Option<String>,
    /// The bucket in a request's path rather than in its host name.
    path_style: Option<bool>,
    /// Who the daemon asks for keys: `profile:NAME`, `environment`, `web-identity` or `instance-metadata`.
    credentials: Option<String>,
}

/// Refuses settings that no tenant can have.
pub(super) fn check_settings(settings: &TenantSettings) -> ApiResult<()> {
    check_known(settings)?;
    let refuse = |message: String, remedy: &str| Err(ApiError::invalid(message, remedy));
    if let Some(weight) = settings.weight.filter(|w| !(1..=WEIGHT_MAX).contains(w)) {
        let remedy = format!("choose 1 to {WEIGHT_MAX}; who has none has 100");
        return refuse(format!("a weight of {weight} cannot be"), &remedy);
    }
    let (reserve, max) = (settings.cache_reserve_bytes, settings.cache_bytes_max);
    if let (Some(reserve), Some(max)) = (reserve, max)
        && reserve > max
    {
        let message =
            format!("{reserve} bytes of cache cannot be reserved for who takes {max} at most");
        return refuse(message, "reserve less, or let it take more");
    }
    check_rates(&settings.rates)?;
    if let Some(key) = &settings.key {
        TenantName::new(key.as_str()).map_err(|error| {
            ApiError::invalid(
                format!("the key's name: {error}"),
                "use a-z, 0-9, '.', '_' and '-'",
            )
        })?;
    }
    if let Some(store) = &settings.store {
        let place = StoreSettings {
            url: store.url.clone(),
            endpoint: store.endpoint.clone(),
            // The daemon's own stands in.
            region: store.region.clone().or_else(|| Some(String::new())),
            credentials: store.credentials.clone(),
            ..StoreSettings::default()
        };
        place
            .place()
            .map_err(|error| ApiError::invalid(error.to_string(), ""))?;
        if let Some(source) = &store.credentials {
            let known = source.parse::<CredentialSource>();
            known.map_err(|error| ApiError::invalid(error.to_string(), ""))?;
        }
    }
    Ok(())
}

/// Refuses fields that no setting has.
fn check_known(settings: &TenantSettings) -> ApiResult<()> {
    let Some(unknown) = unknown(settings) else {
        return Ok(());
    };
    let message = format!("a tenant has no setting {unknown:?}");
    let remedy = "see `quarry tenant update --help`, or the API's document";
    Err(ApiError::invalid(message, remedy))
}

/// Refuses rates at which nothing could be done.
fn check_rates(rates: &quarry_objfmt::Rates) -> ApiResult<()> {
    let counts = [rates.iops, rates.iops_burst, rates.bandwidth_burst_bytes];
    if counts.contains(&Some(0)) {
        let remedy = "leave it out for no limit; to let nothing through, suspend the tenant";
        return Err(ApiError::invalid("a rate of 0 cannot be", remedy));
    }
    if let Some(bytes) = rates.bandwidth_bytes.filter(|b| *b < BANDWIDTH_BYTES_MIN) {
        let message = format!("a bandwidth of {bytes} bytes a second cannot be");
        return Err(ApiError::invalid(message, "choose 64KiB/s or more"));
    }
    Ok(())
}

/// A field that no setting has, if there is one.
fn unknown(settings: &TenantSettings) -> Option<&str> {
    let of_store = settings.store.iter().flat_map(|store| store.others.keys());
    settings
        .others
        .keys()
        .chain(of_store)
        .next()
        .map(String::as_str)
}

/// Settings changed as a JSON merge patch (RFC 7396) says: what it does not name stays, and null takes a limit away.
///
/// # Errors
/// If the patch names a setting that there is none of, or the outcome cannot be.
pub fn patched(before: &TenantSettings, patch: &Map<String, Value>) -> ApiResult<TenantSettings> {
    let parse = |settings: Value| {
        serde_json::from_value::<TenantSettings>(settings).map_err(|error| {
            ApiError::invalid(
                format!("the settings are not what a tenant has: {error}"),
                "mend the request",
            )
        })
    };
    // What a newer program wrote is kept, but only that.
    let alone = parse(Value::Object(without_nulls(patch)))?;
    check_known(&alone)?;
    let mut settings = serde_json::to_value(before)
        .map_err(|error| ApiError::internal(format!("the settings cannot be told: {error}")))?;
    merge(&mut settings, patch);
    let after = parse(settings)?;
    let known = TenantSettings {
        others: Default::default(),
        ..after.clone()
    };
    check_settings(&known)?;
    Ok(after)
}

fn without_nulls(patch: &Map<String, Value>) -> Map<String, Value> {
    let field = |(name, value): (&String, &Value)| match value {
        Value::Null => None,
        Value::Object(inner) => Some((name.clone(), Value::Object(without_nulls(inner)))),
        value => Some((name.clone(), value.clone())),
    };
    patch.iter().filter_map(field).collect()
}

fn merge(target: &mut Value, patch: &Map<String, Value>) {
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else {
        return;
    };
    for (name, value) in patch {
        match value {
            Value::Null => {
                fields.remove(name);
            }
            Value::Object(inner) => merge(fields.entry(name).or_insert(Value::Null), inner),
            value => {
                fields.insert(name.clone(), value.clone());
            }
        }
    }
}

type Tenant = Result<Path<String>, PathRejection>;

fn tenant_of(path: Tenant) -> ApiResult<TenantName> {
    let Path(tenant) = path.map_err(|_| not_utf8())?;
    Ok(TenantName::new(tenant)?)
}

pub(super) async fn create(
    Allowed(engine): Allowed,
    body: Body,
) -> Result<Made<TenantInfo>, Refused> {
    let spec: TenantSpec = json(body)?;
    check_settings(&spec.settings)?;
    let made = whole(async move {
        let same = |found: &TenantInfo| found.settings == spec.settings;
        let existing = engine.show_tenant(&spec.name);
        make(engine.create_tenant(spec.clone()), existing, same).await
    });
    Ok(made.await?)
}

pub(super) async fn list(
    Allowed(engine): Allowed,
    asked: Query<PageQuery>,
) -> ApiResult<Json<TenantList>> {
    let page = page(asked)?;
    let (tenants, next) = page.cut(engine.list_tenants().await?, |t| t.name.clone());
    Ok(Json(TenantList { tenants, next }))
}

pub(super) async fn show(Allowed(engine): Allowed, path: Tenant) -> ApiResult<Json<TenantInfo>> {
    Ok(Json(engine.show_tenant(&tenant_of(path)?).await?))
}

pub(super) async fn update(
    Allowed(engine): Allowed,
    path: Tenant,
    body: Body,
) -> Result<Json<TenantInfo>, Refused> {
    let tenant = tenant_of(path)?;
    let patch: Map<String, Value> = json(body)?;
    let call = async move { engine.update_tenant(&tenant, &patch).await };
    Ok(Json(whole(call).await?))
}

pub(super) async fn suspend(
    Allowed(engine): Allowed,
    path: Tenant,
    body: Body,
) -> Result<Json<TenantInfo>, Refused> {
    let tenant = tenant_of(path)?;
    let SuspendSpec { how } = json(body)?;
    let call = async move { engine.suspend_tenant(&tenant, Some(how)).await };
    Ok(Json(whole(call).await?))
}

pub(super) async fn resume(Allowed(engine): Allowed, path: Tenant) -> ApiResult<Json<TenantInfo>> {
    let tenant = tenant_of(path)?;
    let call = async move { engine.suspend_tenant(&tenant, None).await };
    Ok(Json(whole(call).await?))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TenantDelete {
    /// Purge its trash too.
    #[serde(default)]
    purge: bool,
}

pub(super) async fn delete(
    Allowed(engine): Allowed,
    path: Tenant,
    asked: Query<TenantDelete>,
) -> ApiResult<StatusCode> {
    let tenant = tenant_of(path)?;
    let how = query(asked, "use ?purge=true or none")?;
    whole(async move { engine.delete_tenant(&tenant, how.purge).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn documented_settings_are_those_that_there_are() {
        let store = quarry_objfmt::TenantStore {
            url: "s3://b".to_owned(),
            endpoint: Some("http://h".to_owned()),
            region: Some("r".to_owned()),
            path_style: Some(true),
            credentials: Some("environment".to_owned()),
            ..Default::default()
        };
        let rates = quarry_objfmt::Rates {
            iops: Some(1),
            iops_burst: Some(1),
            bandwidth_bytes: Some(1),
            bandwidth_burst_bytes: Some(1),
        };
        let all = TenantSettings {
            store: Some(store),
            provisioned_bytes_max: Some(1),
            stored_bytes_max: Some(1),
            volumes_max: Some(1),
            snapshots_max: Some(1),
            rates,
            weight: Some(1),
            cache_reserve_bytes: Some(1),
            cache_bytes_max: Some(1),
            dirty_bytes_max: Some(1),
            key: Some("k".to_owned()),
            suspended: Some(Suspended::Stall),
            others: Default::default(),
        };
        let said = serde_json::to_value(&all).unwrap();
        serde_json::from_value::<SettingsDoc>(said.clone()).unwrap();
        let schema = schemars::schema_for!(SettingsDoc);
        let documented = schema.as_value()["properties"].as_object().unwrap();
        let said = said.as_object().unwrap();
        assert!(documented.keys().eq(said.keys()), "{documented:?}");
    }

    fn settings(json: Value) -> TenantSettings {
        serde_json::from_value(json).unwrap()
    }

    fn patch(before: &TenantSettings, patch: Value) -> ApiResult<TenantSettings> {
        let Value::Object(patch) = patch else {
            panic!("a patch is an object")
        };
        patched(before, &patch)
    }

    #[test]
    fn patch_changes_what_it_names_and_null_takes_a_limit_away() {
        let before = settings(json!({
            "volumes_max": 5, "rates": {"iops": 100}, "store": {"url": "s3://b/p"}, "newer": 1
        }));
        let after = patch(
            &before,
            json!({"volumes_max": null, "rates": {"bandwidth_bytes": 1 << 20}}),
        )
        .unwrap();
        let wanted = settings(json!({
            "rates": {"iops": 100, "bandwidth_bytes": 1 << 20}, "store": {"url": "s3://b/p"}, "newer": 1
        }));
        assert_eq!(after, wanted);
        assert_eq!(patch(&before, json!({"store": null})).unwrap().store, None);
        // What it is reached by, without saying again where it is.
        let reached = json!({"store": {"credentials": "profile:new"}});
        let store = patch(&before, reached.clone()).unwrap().store.unwrap();
        assert_eq!(
            (store.url.as_str(), store.credentials.as_deref()),
            ("s3://b/p", Some("profile:new"))
        );
        assert!(
            patch(&TenantSettings::default(), reached).is_err(),
            "of no store"
        );
    }

    #[test]
    fn patch_of_what_there_is_not_is_refused_and_named() {
        let none = TenantSettings::default();
        for (wrong, word) in [
            (json!({"volume_max": 5}), "volume_max"),
            (json!({"store": {"url": "s3://b", "tier": 1}}), "tier"),
            (json!({"volumes_max": -1}), "settings"),
            (json!({"rates": {"iops": 0}}), "rate of 0"),
            (json!({"rates": {"bandwidth_bytes": 100}}), "bandwidth"),
            (json!({"weight": 0}), "weight"),
            (json!({"store": {"url": "http://x"}}), "http://x"),
            (
                json!({"store": {"url": "s3://b", "credentials": "AKIA"}}),
                "credentials",
            ),
            (
                json!({"cache_reserve_bytes": 2, "cache_bytes_max": 1}),
                "reserved",
            ),
            (json!({"suspended": "gone"}), "settings"),
        ] {
            let error = patch(&none, wrong).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn reserve_beyond_the_most_is_refused_whichever_is_changed() {
        let before = settings(json!({"cache_bytes_max": 10}));
        assert!(patch(&before, json!({"cache_reserve_bytes": 11})).is_err());
        assert!(patch(&before, json!({"cache_reserve_bytes": 10})).is_ok());
    }
}
