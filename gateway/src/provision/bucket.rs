//! The bucket itself: whether it is there, and whether its rules leave our objects alone.
//!
//! The client of the AWS SDK serves here only; it gets its keys from where the store's client does.

use std::borrow::Cow;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::create_bucket::CreateBucketError;
use aws_sdk_s3::operation::get_bucket_lifecycle_configuration::GetBucketLifecycleConfigurationOutput as Lifecycle;
use aws_sdk_s3::types::{
    AbortIncompleteMultipartUpload, BucketLifecycleConfiguration, BucketLocationConstraint,
    BucketVersioningStatus, CreateBucketConfiguration, ExpirationStatus, LifecycleRule,
    LifecycleRuleFilter, TransitionStorageClass,
};

use super::ProvisionError;
use crate::store::{CredentialSource, S3Settings, aws_http, credentials, last_cause};

/// How long a request may take, its retries included.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(20);
/// How long an attempt may take.
const ATTEMPT_TIME_MAX: Duration = Duration::from_secs(8);
/// The region that a request to make a bucket must not name.
const REGION_UNNAMED: &str = "us-east-1";

/// After so many days an upload in parts that was not finished is given up.
const UPLOAD_DAYS_MAX: i32 = 7;
/// What our rule is called, before the prefix.
const UPLOADS_RULE: &str = "quarry: end broken-off uploads under";

/// A bucket on its server.
pub(super) struct Bucket {
    client: Client,
    name: String,
    region: String,
    /// Id of the access key.
    key_id: String,
    /// What our keys begin with: empty, or ends with `/`.
    prefix: String,
}

impl Bucket {
    pub(super) async fn open(settings: &S3Settings) -> Result<Self, ProvisionError> {
        let bucket = |reason: String, transient| ProvisionError::Bucket {
            bucket: settings.bucket.clone(),
            action: "reached",
            reason,
            remedy: no_keys(settings),
            transient,
        };
        let keys = tokio::time::timeout(REQUEST_TIME_MAX, credentials(settings)?.get_credential())
            .await
            .map_err(|_| bucket("nobody gave us keys in time".to_owned(), true))?
            .map_err(|error| bucket(error.to_string(), false))?;
        let mut config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .http_client(aws_http())
            .region(Region::new(settings.region.clone()))
            .credentials_provider(Credentials::new(
                &keys.key_id,
                &keys.secret_key,
                keys.token.clone(),
                None,
                "quarry",
            ))
            .force_path_style(settings.path_style)
            .retry_config(RetryConfig::standard())
            .timeout_config(
                TimeoutConfig::builder()
                    .operation_timeout(REQUEST_TIME_MAX)
                    .operation_attempt_timeout(ATTEMPT_TIME_MAX)
                    .build(),
            );
        if let Some(endpoint) = &settings.endpoint {
            config = config.endpoint_url(endpoint);
        }
        let prefix = match settings.prefix.as_str() {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        Ok(Self {
            client: Client::from_conf(config.build()),
            name: settings.bucket.clone(),
            region: settings.region.clone(),
            key_id: keys.key_id.clone(),
            prefix,
        })
    }

    /// Makes the bucket if it is not there; whether that was done.
    pub(super) async fn ensure(&self, may_make: bool) -> Result<bool, ProvisionError> {
        let Err(error) = self.client.head_bucket().bucket(&self.name).send().await else {
            return Ok(false);
        };
        // An answer to HEAD has no body that says why.
        let refused = |reason, remedy| ProvisionError::Bucket {
            bucket: self.name.clone(),
            action: "reached",
            reason,
            remedy: Cow::Borrowed(remedy),
            transient: false,
        };
        match status(&error) {
            Some(404) if may_make => self.make().await,
            Some(404) => Err(ProvisionError::BucketMissing {
                bucket: self.name.clone(),
            }),
            Some(301 | 400) => {
                let reason = match region(&error).filter(|region| *region != self.region) {
                    Some(region) => format!("it is in the region {region}, not {}", self.region),
                    None => words(&error),
                };
                Err(refused(reason, "check store.region, or AWS_REGION"))
            }
            Some(status @ (401 | 403)) => Err(refused(
                format!(
                    "the server refuses the access key {} ({status})",
                    self.key_id
                ),
                "check the key and its secret, the clock, and s3:ListBucket on the bucket",
            )),
            _ => Err(self.failed("reached", &error, "check the endpoint and the network")),
        }
    }

    async fn make(&self) -> Result<bool, ProvisionError> {
        let mut request = self.client.create_bucket().bucket(&self.name);
        if self.region != REGION_UNNAMED {
            let place = BucketLocationConstraint::from(self.region.as_str());
            let place = CreateBucketConfiguration::builder().location_constraint(place);
            request = request.create_bucket_configuration(place.build());
        }
        match request.send().await {
            Ok(_) => Ok(true),
            // Another daemon was first.
            Err(error)
                if matches!(
                    error.as_service_error(),
                    Some(CreateBucketError::BucketAlreadyOwnedByYou(_))
                ) =>
            {
                Ok(false)
            }
            Err(error) => {
                let remedy = "make it yourself, or grant s3:CreateBucket, or choose another name";
                Err(self.failed("made", &error, remedy))
            }
        }
    }

    /// Refuses rules that would take our objects away. What could not be checked is a warning.
    pub(super) async fn check_lifecycle(&self) -> Result<Option<String>, ProvisionError> {
        let request = self.client.get_bucket_lifecycle_configuration();
        let error = match request.bucket(&self.name).send().await {
            Ok(found) => {
                for rule in found.rules() {
                    if let Some(effect) = effect(rule, &self.prefix) {
                        return Err(ProvisionError::Lifecycle {
                            bucket: self.name.clone(),
                            rule: rule.id().unwrap_or("(without a name)").to_owned(),
                            effect,
                            prefix: self.prefix.clone(),
                        });
                    }
                }
                return Ok(None);
            }
            Err(error) => error,
        };
        match status(&error) {
            // No rules, or a server that knows none.
            Some(404 | 405 | 501) => Ok(None),
            // An answer of success that is none: a server that does not know the question.
            Some(200..=299 | 400..=499) => Ok(Some(format!(
                "the lifecycle rules of the bucket {} cannot be read ({}): make sure that none \
                 expires objects under {:?}, or grant s3:GetLifecycleConfiguration",
                self.name,
                words(&error),
                self.prefix
            ))),
            _ => Err(self.failed("asked for its lifecycle rules", &error, "try again")),
        }
    }

    /// Refuses a bucket that keeps deleted objects for ever. What could not be checked is a warning.
    pub(super) async fn check_versioning(&self) -> Result<Option<String>, ProvisionError> {
        let asked = self.client.get_bucket_versioning().bucket(&self.name);
        match asked.send().await {
            Ok(found) if found.status() == Some(&BucketVersioningStatus::Enabled) => {
                let expires = |rule: &LifecycleRule| expires_versions(rule, &self.prefix);
                let lifecycle = self.lifecycle().await;
                if lifecycle.is_some_and(|found| found.rules().iter().any(expires)) {
                    return Ok(None);
                }
                Err(ProvisionError::Versioning {
                    bucket: self.name.clone(),
                    prefix: self.prefix.clone(),
                })
            }
            Ok(_) => Ok(None),
            Err(error) => match status(&error) {
                // A server that knows no versions.
                Some(404 | 405 | 501) => Ok(None),
                Some(200..=299 | 400..=499) => Ok(Some(format!(
                    "whether the bucket {} keeps versions cannot be read ({}): make sure that it does not, or grant \
                     s3:GetBucketVersioning",
                    self.name,
                    words(&error)
                ))),
                _ => Err(self.failed("asked for its versioning", &error, "try again")),
            },
        }
    }

    /// Adds a rule that ends uploads in parts under our prefix which were broken off: other programs' for the most, for we
    /// make none. What cannot be done is a warning. *Whoever changes the rules at the same moment may undo it, or be undone:
    /// S3 takes all rules at once, without a condition.*
    pub(super) async fn ensure_uploads_end(&self) -> Option<String> {
        let found = self.lifecycle().await?;
        let ends = |rule: &LifecycleRule| {
            *rule.status() == ExpirationStatus::Enabled
                && rule.abort_incomplete_multipart_upload().is_some()
                && covers(rule, &self.prefix)
        };
        if found.rules().iter().any(ends) {
            return None;
        }
        let abort = AbortIncompleteMultipartUpload::builder()
            .days_after_initiation(UPLOAD_DAYS_MAX)
            .build();
        let rule = LifecycleRule::builder()
            .id(format!("{UPLOADS_RULE} {}", self.prefix).trim_end())
            .status(ExpirationStatus::Enabled)
            .filter(LifecycleRuleFilter::builder().prefix(&self.prefix).build())
            .abort_incomplete_multipart_upload(abort)
            .build();
        let mut rules = found.rules.unwrap_or_default();
        rules.push(rule.ok()?);
        let all = BucketLifecycleConfiguration::builder().set_rules(Some(rules));
        let request = self.client.put_bucket_lifecycle_configuration();
        let request = request
            .bucket(&self.name)
            .lifecycle_configuration(all.build().ok()?)
            // Without it the server takes its own for all rules.
            .set_transition_default_minimum_object_size(
                found.transition_default_minimum_object_size,
            );
        let error = request.send().await.err()?;
        match status(&error) {
            Some(404 | 405 | 501) => None,
            _ => Some(format!(
                "the bucket {} did not take a lifecycle rule that ends broken-off uploads under {:?} ({}): add one, or \
                 grant s3:PutLifecycleConfiguration",
                self.name,
                self.prefix,
                words(&error)
            )),
        }
    }

    /// The lifecycle rules and what is set for all of them, if they can be read; a bucket without any has none.
    async fn lifecycle(&self) -> Option<Lifecycle> {
        let request = self.client.get_bucket_lifecycle_configuration();
        match request.bucket(&self.name).send().await {
            Ok(found) => Some(found),
            Err(error) if status(&error) == Some(404) => Some(Lifecycle::builder().build()),
            Err(_) => None,
        }
    }

    fn failed<E>(
        &self,
        action: &'static str,
        error: &SdkError<E>,
        remedy: &'static str,
    ) -> ProvisionError
    where
        SdkError<E>: ProvideErrorMetadata + std::error::Error,
    {
        ProvisionError::Bucket {
            bucket: self.name.clone(),
            action,
            reason: words(error),
            remedy: Cow::Borrowed(remedy),
            // No connection, no answer in time, or the server's own trouble; its code is not asked,
            // for an answer to HEAD has none.
            transient: match error {
                SdkError::TimeoutError(_) | SdkError::DispatchFailure(_) => true,
                error => status(error).is_some_and(|status| status >= 500 || status == 429),
            },
        }
    }
}

fn status<E>(error: &SdkError<E>) -> Option<u16> {
    error.raw_response().map(|answer| answer.status().as_u16())
}

/// The region that the bucket is in, if the server says so.
fn region<E>(error: &SdkError<E>) -> Option<&str> {
    error.raw_response()?.headers().get("x-amz-bucket-region")
}

/// What to do if there are no keys.
fn no_keys(settings: &S3Settings) -> Cow<'static, str> {
    use CredentialSource as Source;
    match &settings.source {
        Some((Source::Profile(name), Some(file))) => {
            format!("check the profile {name} in {}", file.display()).into()
        }
        Some((Source::Profile(name), None)) => format!(
            "check the profile {name} in ~/.aws/credentials, or name its file in store.credentials_file"
        )
        .into(),
        Some((Source::WebIdentity, _)) => {
            "set AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN for the daemon".into()
        }
        Some((Source::InstanceMetadata, _)) => "give the machine a role".into(),
        Some((Source::Environment, _)) => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the daemon".into()
        }
        None => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role".into()
        }
    }
}

/// The server's code and message, else its status, or what kept it from answering.
fn words<E>(error: &SdkError<E>) -> String
where
    SdkError<E>: ProvideErrorMetadata + std::error::Error,
{
    match (error.code(), error.message()) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        _ => match status(error) {
            Some(status @ 200..=299) => format!("the server's answer makes no sense ({status})"),
            Some(status) => format!("the server answers {status}"),
            None => last_cause(error),
        },
    }
}

/// Whether a rule is about all objects under `prefix`, whatever they are.
fn covers(rule: &LifecycleRule, prefix: &str) -> bool {
    #[expect(deprecated, reason = "old rules still say their prefix there")]
    let mut of = rule.prefix();
    if let Some(filter) = rule.filter() {
        let is_plain = filter.tag().is_none()
            && filter.and().is_none()
            && filter.object_size_greater_than().is_none()
            && filter.object_size_less_than().is_none();
        if !is_plain {
            return false;
        }
        of = of.or(filter.prefix());
    }
    prefix.starts_with(of.unwrap_or_default())
}

/// Whether a rule takes away what was deleted under `prefix`.
fn expires_versions(rule: &LifecycleRule, prefix: &str) -> bool {
    *rule.status() == ExpirationStatus::Enabled
        && rule.noncurrent_version_expiration().is_some()
        && covers(rule, prefix)
}

/// What a rule does to objects under `prefix` that they do not survive. Our objects have no tags,
/// and any size.
fn effect(rule: &LifecycleRule, prefix: &str) -> Option<&'static str> {
    if *rule.status() != ExpirationStatus::Enabled {
        return None;
    }
    #[expect(deprecated, reason = "old rules still say their prefix there")]
    let mut of = rule.prefix();
    if let Some(filter) = rule.filter() {
        let and = filter.and();
        if filter.tag().is_some() || and.is_some_and(|and| !and.tags().is_empty()) {
            return None;
        }
        of = of.or(filter.prefix()).or(and.and_then(|and| and.prefix()));
    }
    let of = of.unwrap_or_default();
    if !of.starts_with(prefix) && !prefix.starts_with(of) {
        return None;
    }
    let expires = rule
        .expiration()
        .is_some_and(|when| when.days().is_some() || when.date().is_some());
    let archives = rule.transitions().iter().any(|to| {
        matches!(
            to.storage_class(),
            Some(TransitionStorageClass::Glacier | TransitionStorageClass::DeepArchive)
        )
    });
    match (expires, archives) {
        (true, _) => Some("deletes"),
        (false, true) => Some("archives"),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use aws_sdk_s3::error::ConnectorError;
    use aws_sdk_s3::types::{LifecycleExpiration, LifecycleRuleAndOperator, Tag, Transition};

    use super::*;
    use crate::store::stub::{Answer, noting_settings, settings_at, stub_settings};

    fn rule(filter: Option<LifecycleRuleFilter>) -> LifecycleRule {
        let days = LifecycleExpiration::builder().days(30).build();
        LifecycleRule::builder()
            .status(ExpirationStatus::Enabled)
            .set_filter(filter)
            .expiration(days)
            .build()
            .unwrap()
    }

    fn of(prefix: &str) -> LifecycleRuleFilter {
        LifecycleRuleFilter::builder().prefix(prefix).build()
    }

    #[test]
    fn rule_that_meets_our_prefix_is_refused() {
        for ours in ["a/b/", ""] {
            for theirs in ["", "a", "a/", "a/b", "a/b/", "a/b/t/acme"] {
                let rule = rule(Some(of(theirs)));
                assert_eq!(effect(&rule, ours), Some("deletes"), "{theirs:?} {ours:?}");
            }
        }
        assert_eq!(effect(&rule(None), "a/"), Some("deletes"));
        for theirs in ["b", "a/c", "a/b.c"] {
            assert_eq!(effect(&rule(Some(of(theirs))), "a/b/"), None, "{theirs}");
        }
    }

    #[test]
    fn rule_of_other_objects_or_without_effect_is_let_be() {
        let tag = Tag::builder().key("k").value("v").build().unwrap();
        let tagged = LifecycleRuleFilter::builder().tag(tag.clone()).build();
        assert_eq!(effect(&rule(Some(tagged)), ""), None);
        let and = LifecycleRuleAndOperator::builder()
            .prefix("a/")
            .tags(tag)
            .build();
        let tagged = LifecycleRuleFilter::builder().and(and).build();
        assert_eq!(effect(&rule(Some(tagged)), ""), None);
        let large = LifecycleRuleAndOperator::builder()
            .prefix("a/")
            .object_size_greater_than(1);
        let large = LifecycleRuleFilter::builder().and(large.build()).build();
        assert_eq!(effect(&rule(Some(large.clone())), "a/"), Some("deletes"));
        assert_eq!(effect(&rule(Some(large)), "b/"), None);

        let mut off = rule(None);
        off.status = ExpirationStatus::Disabled;
        assert_eq!(effect(&off, ""), None);
        let mut markers = rule(None);
        markers.expiration = Some(
            LifecycleExpiration::builder()
                .expired_object_delete_marker(true)
                .build(),
        );
        assert_eq!(effect(&markers, ""), None);
    }

    #[test]
    fn rule_that_archives_is_refused_and_one_to_a_cheaper_class_is_not() {
        let to = |class| {
            let to = Transition::builder().days(1).storage_class(class).build();
            LifecycleRule::builder()
                .status(ExpirationStatus::Enabled)
                .transitions(to)
                .build()
                .unwrap()
        };
        assert_eq!(
            effect(&to(TransitionStorageClass::DeepArchive), ""),
            Some("archives")
        );
        assert_eq!(effect(&to(TransitionStorageClass::StandardIa), ""), None);
        assert_eq!(effect(&to(TransitionStorageClass::GlacierIr), ""), None);
    }

    async fn bucket(answer: Answer) -> Bucket {
        Bucket::open(&stub_settings(answer).await).await.unwrap()
    }

    #[tokio::test]
    async fn lifecycle_rules_are_read_and_refused() {
        let rules = "<LifecycleConfiguration><Rule><ID>tidy</ID><Filter><Prefix>some</Prefix></Filter>\
            <Status>Enabled</Status><Expiration><Days>7</Days></Expiration></Rule></LifecycleConfiguration>";
        let error = bucket(Answer::new(200, rules))
            .await
            .check_lifecycle()
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("\"tidy\"") && text.contains("deletes"),
            "{text}"
        );
    }

    /// All rules went by the server's own again.
    #[tokio::test]
    async fn rule_that_ends_uploads_leaves_the_smallest_size_for_transitions_as_it_was() {
        let rules = "<LifecycleConfiguration><Rule><ID>tidy</ID><Filter><Prefix>other</Prefix></Filter>\
            <Status>Enabled</Status><Expiration><Days>7</Days></Expiration></Rule></LifecycleConfiguration>";
        let name = "x-amz-transition-default-minimum-object-size";
        let put = async |answer: Answer| {
            let (settings, heads) = noting_settings(answer).await;
            let bucket = Bucket::open(&settings).await.unwrap();
            assert_eq!(bucket.ensure_uploads_end().await, None);
            let heads = heads.lock();
            let put = heads.iter().find(|head| head.starts_with("put "));
            put.cloned().unwrap()
        };
        let set = put(Answer::new(200, rules).with(name, "varies_by_storage_class")).await;
        let header = format!("{name}: varies_by_storage_class");
        assert!(set.lines().any(|line| line == header), "{set}");
        let unset = put(Answer::new(200, rules)).await;
        assert!(!unset.contains(name), "{unset}");
    }

    #[tokio::test]
    async fn versions_kept_for_ever_are_refused_with_what_to_do() {
        let on = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
        let refused = bucket(Answer::new(200, on)).await.check_versioning().await;
        let text = refused.unwrap_err().to_string();
        assert!(
            text.contains("noncurrent") && text.contains("some/prefix"),
            "{text}"
        );
        for off in [
            "<VersioningConfiguration/>",
            "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>",
        ] {
            let let_be = bucket(Answer::new(200, off)).await.check_versioning().await;
            assert_eq!(let_be.unwrap(), None);
        }
        let unknown = bucket(Answer::error(501, "NotImplemented")).await;
        assert_eq!(unknown.check_versioning().await.unwrap(), None);
    }

    #[test]
    fn rule_that_expires_versions_counts_if_it_covers_the_prefix() {
        let rule = |prefix: &str| {
            let versions = aws_sdk_s3::types::NoncurrentVersionExpiration::builder()
                .noncurrent_days(1)
                .build();
            LifecycleRule::builder()
                .status(ExpirationStatus::Enabled)
                .filter(LifecycleRuleFilter::builder().prefix(prefix).build())
                .noncurrent_version_expiration(versions)
                .build()
                .unwrap()
        };
        assert!(expires_versions(&rule(""), "a/b/"));
        assert!(expires_versions(&rule("a/"), "a/b/"));
        assert!(!expires_versions(&rule("a/b/c/"), "a/b/"));
        assert!(!expires_versions(&rule("x/"), "a/b/"));
    }

    #[tokio::test]
    async fn lifecycle_rules_absent_unknown_or_hidden_are_let_be() {
        for answer in [
            Answer::error(404, "NoSuchLifecycleConfiguration"),
            Answer::error(501, "NotImplemented"),
            Answer::error(405, "MethodNotAllowed"),
        ] {
            assert_eq!(bucket(answer).await.check_lifecycle().await.unwrap(), None);
        }
        let denied = bucket(Answer::error(403, "AccessDenied")).await;
        let warning = denied.check_lifecycle().await.unwrap().unwrap();
        assert!(
            warning.contains("s3:GetLifecycleConfiguration"),
            "{warning}"
        );
    }

    #[tokio::test]
    async fn bucket_missing_or_denied_is_refused_with_a_remedy() {
        let missing = bucket(Answer::new(404, ""))
            .await
            .ensure(false)
            .await
            .unwrap_err();
        assert!(
            matches!(missing, ProvisionError::BucketMissing { .. }),
            "{missing}"
        );
        for status in [401, 403] {
            let denied = bucket(Answer::new(status, ""))
                .await
                .ensure(true)
                .await
                .unwrap_err();
            let words = format!(
                "the server refuses the access key id ({status}): check the key and its secret, the clock, and \
                 s3:ListBucket on the bucket"
            );
            assert!(denied.to_string().ends_with(&words), "{denied}");
            assert!(!denied.is_transient());
        }
    }

    #[tokio::test]
    async fn bucket_in_another_region_is_told_with_the_region_if_the_server_names_it() {
        let told = async |answer| {
            let refused = bucket(answer).await.ensure(true).await;
            refused.unwrap_err().to_string()
        };
        for status in [301, 400] {
            let answer = Answer::new(status, "").with("x-amz-bucket-region", "eu-west-1");
            let text = told(answer).await;
            let words = "it is in the region eu-west-1, not us-east-1: check store.region";
            assert!(text.contains(words), "{text}");
            let text = told(Answer::new(status, "")).await;
            assert!(
                text.contains(&format!("answers {status}: check store.region")),
                "{text}"
            );
        }
    }

    #[test]
    fn server_that_cannot_be_connected_to_is_told_by_the_last_cause() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error: SdkError<CreateBucketError> =
            SdkError::dispatch_failure(ConnectorError::io(refused.into()));
        assert_eq!(words(&error), "connection refused");
    }

    #[tokio::test]
    async fn profile_that_gives_no_keys_is_named_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        std::fs::write(&path, "[other]\n").unwrap();
        let source = CredentialSource::Profile("nope".to_owned());
        let settings = S3Settings {
            keys: None,
            source: Some((source, Some(path.clone()))),
            ..settings_at("http://127.0.0.1:1".to_owned())
        };
        let error = Bucket::open(&settings).await.err().unwrap().to_string();
        let words = format!(": check the profile nope in {}", path.display());
        assert!(error.ends_with(&words), "{error}");
    }
}
