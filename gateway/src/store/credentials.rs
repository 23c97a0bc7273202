//! Where the keys of a store come from, when they are not in the configuration: named by a word, found out by the
//! AWS SDK, and asked for again so that they are rotated without a restart.
//!
//! Owns: the words, and how long an answer is used. Does not own: how a profile, a role or a machine's identity is
//! turned into keys (`aws-config`), nor what is done with them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_config::environment::EnvironmentVariableCredentialsProvider;
use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::web_identity_token::WebIdentityTokenCredentialsProvider;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_sdk_s3::config::{Region, SharedHttpClient};
use aws_smithy_http_client::tls;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::install_crypto;

/// How long keys are used before they are asked for again: so long does a rotation take to be seen.
const USED_FOR: Duration = Duration::from_secs(60);
/// How long before their end keys are asked for again.
const RENEWED_BEFORE: Duration = Duration::from_secs(5 * 60);
/// How long whoever knows the keys may take to tell them.
const ASK_TIME_MAX: Duration = Duration::from_secs(20);
/// How long is waited after a failure before asking again, while older keys still hold.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Who is asked for keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CredentialSource {
    /// A profile of the AWS configuration files: keys, a role to assume, a program to ask.
    Profile(String),
    /// `AWS_ACCESS_KEY_ID` and its companions.
    Environment,
    /// A role, by the token in the file that `AWS_WEB_IDENTITY_TOKEN_FILE` names.
    WebIdentity,
    /// The machine's role, by the metadata service.
    InstanceMetadata,
}

/// A word that names no source of keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{found:?} names no credentials: write profile:NAME, environment, web-identity or instance-metadata"
)]
pub struct UnknownSource {
    /// The word.
    pub found: String,
}

impl FromStr for CredentialSource {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<Self, UnknownSource> {
        let plain = |name: &&str| {
            !name.is_empty() && !name.contains(|c: char| c.is_control() || matches!(c, '[' | ']'))
        };
        match text {
            "environment" => Ok(Self::Environment),
            "web-identity" => Ok(Self::WebIdentity),
            "instance-metadata" => Ok(Self::InstanceMetadata),
            _ => match text.strip_prefix("profile:").filter(plain) {
                Some(name) => Ok(Self::Profile(name.to_owned())),
                None => Err(UnknownSource {
                    found: text.to_owned(),
                }),
            },
        }
    }
}

impl fmt::Display for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profile(name) => write!(f, "profile:{name}"),
            Self::Environment => f.write_str("environment"),
            Self::WebIdentity => f.write_str("web-identity"),
            Self::InstanceMetadata => f.write_str("instance-metadata"),
        }
    }
}

/// Gives the newest keys of a source.
pub(super) struct Rotating {
    source: CredentialSource,
    profiles: Option<PathBuf>,
    region: String,
    newest: Mutex<Option<Newest>>,
}

struct Newest {
    keys: Arc<AwsCredential>,
    /// When they are asked for again.
    asked_again: Instant,
    /// When they end, if they do.
    ends: Option<SystemTime>,
}

impl Rotating {
    /// Keys from `source`; profiles are looked for in `profiles`, or where AWS programs do.
    pub(super) fn new(source: CredentialSource, profiles: Option<PathBuf>, region: &str) -> Self {
        Self {
            source,
            profiles,
            region: region.to_owned(),
            newest: Mutex::default(),
        }
    }

    /// Asks anew, files and all: the SDK's own providers read a file once.
    async fn ask(&self) -> Result<Credentials, String> {
        let provider = provider(&self.source, self.profiles.as_deref(), &self.region);
        match timeout(ASK_TIME_MAX, provider.provide_credentials()).await {
            Ok(Ok(keys)) => Ok(keys),
            Ok(Err(error)) => Err(format!(
                "{} gives no keys: {}",
                self.source,
                aws_sdk_s3::error::DisplayErrorContext(error)
            )),
            Err(_) => Err(format!(
                "{} gave no keys within {ASK_TIME_MAX:?}",
                self.source
            )),
        }
    }
}

/// What the AWS SDK speaks HTTP by.
pub(crate) fn aws_http() -> SharedHttpClient {
    install_crypto();
    let ring = tls::rustls_provider::CryptoMode::Ring;
    aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(ring))
        .build_https()
}

fn provider(
    source: &CredentialSource,
    profiles: Option<&Path>,
    region: &str,
) -> SharedCredentialsProvider {
    let http = aws_http();
    let config = ProviderConfig::without_region()
        .with_region(Some(Region::new(region.to_owned())))
        .with_http_client(http);
    match source {
        CredentialSource::Profile(name) => {
            let mut profile = ProfileFileCredentialsProvider::builder()
                .configure(&config)
                .profile_name(name);
            if let Some(path) = profiles {
                let files =
                    EnvConfigFiles::builder().with_file(EnvConfigFileKind::Credentials, path);
                profile = profile.profile_files(files.build());
            }
            SharedCredentialsProvider::new(profile.build())
        }
        CredentialSource::Environment => {
            SharedCredentialsProvider::new(EnvironmentVariableCredentialsProvider::new())
        }
        CredentialSource::WebIdentity => SharedCredentialsProvider::new(
            WebIdentityTokenCredentialsProvider::builder()
                .configure(&config)
                .build(),
        ),
        CredentialSource::InstanceMetadata => SharedCredentialsProvider::new(
            ImdsCredentialsProvider::builder()
                .configure(&config)
                .build(),
        ),
    }
}

#[async_trait]
impl CredentialProvider for Rotating {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        // One asks for all that wait.
        let mut newest = self.newest.lock().await;
        if let Some(newest) = &*newest
            && Instant::now() < newest.asked_again
        {
            return Ok(Arc::clone(&newest.keys));
        }
        match self.ask().await {
            Ok(found) => {
                let keys = Arc::new(AwsCredential {
                    key_id: found.access_key_id().to_owned(),
                    secret_key: found.secret_access_key().to_owned(),
                    token: found.session_token().map(ToOwned::to_owned),
                });
                let ends = found.expiry();
                *newest = Some(Newest {
                    keys: Arc::clone(&keys),
                    asked_again: Instant::now() + used_for(ends, SystemTime::now()),
                    ends,
                });
                Ok(keys)
            }
            Err(reason) => {
                // A file that is just being replaced, a service that is away: what holds is used.
                if let Some(held) = newest.as_mut()
                    && held.ends.is_none_or(|ends| SystemTime::now() < ends)
                {
                    tracing::warn!(%reason, "the newest keys of a store are used on");
                    held.asked_again = Instant::now() + ASK_AGAIN;
                    return Ok(Arc::clone(&held.keys));
                }
                Err(object_store::Error::Generic {
                    store: "credentials",
                    source: reason.into(),
                })
            }
        }
    }
}

/// How long keys that end at `ends` are used without asking again.
fn used_for(ends: Option<SystemTime>, now: SystemTime) -> Duration {
    let left = |ends: SystemTime| {
        let left = ends.duration_since(now).unwrap_or_default();
        left.saturating_sub(RENEWED_BEFORE)
    };
    ends.map_or(USED_FOR, |ends| left(ends).min(USED_FOR))
}

impl fmt::Debug for Rotating {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rotating({})", self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_words_that_read_back() {
        for text in [
            "profile:acme",
            "profile:a b",
            "environment",
            "web-identity",
            "instance-metadata",
        ] {
            assert_eq!(text.parse::<CredentialSource>().unwrap().to_string(), text);
        }
        for text in ["", "profile:", "profile:a\nb", "profile:a]", "AKIAEXAMPLE"] {
            let error = text.parse::<CredentialSource>().unwrap_err().to_string();
            assert!(error.contains("write profile:NAME"), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn profile_rotated_is_seen_and_one_lost_is_used_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let write = |id: &str| {
            let text =
                format!("[acme]\naws_access_key_id = {id}\naws_secret_access_key = hidden\n");
            std::fs::write(&path, text).unwrap();
        };
        write("one");
        let source = CredentialSource::Profile("acme".to_owned());
        let keys = Rotating::new(source, Some(path.clone()), "r");
        let id = async || keys.get_credential().await.map(|k| k.key_id.clone());
        assert_eq!(id().await.unwrap(), "one");
        write("two");
        assert_eq!(id().await.unwrap(), "one");
        tokio::time::advance(USED_FOR).await;
        assert_eq!(id().await.unwrap(), "two");
        std::fs::remove_file(&path).unwrap();
        tokio::time::advance(USED_FOR).await;
        assert_eq!(id().await.unwrap(), "two");
        write("three");
        tokio::time::advance(ASK_AGAIN).await;
        assert_eq!(id().await.unwrap(), "three");
    }

    #[tokio::test]
    async fn profile_missing_is_named_and_no_secret_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        std::fs::write(
            &path,
            "[other]\naws_access_key_id = a\naws_secret_access_key = hunter2\n",
        )
        .unwrap();
        let source = CredentialSource::Profile("acme".to_owned());
        let keys = Rotating::new(source, Some(path), "r");
        let error = keys.get_credential().await.unwrap_err().to_string();
        assert!(error.contains("profile:acme"), "{error}");
        assert!(!format!("{error} {keys:?}").contains("hunter2"));
    }

    #[test]
    fn keys_are_asked_for_again_before_they_end() {
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(used_for(None, now), USED_FOR);
        let hour = Some(now + Duration::from_secs(3600));
        assert_eq!(used_for(hour, now), USED_FOR);
        assert_eq!(used_for(Some(now + RENEWED_BEFORE), now), Duration::ZERO);
    }
}
