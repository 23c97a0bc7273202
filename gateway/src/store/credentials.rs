//! Where the keys of a store come from, when they are not in the configuration: named by a word, found out by the
//! AWS SDK, and asked for again so that they are rotated without a restart.
//!
//! Owns: the words, and how long an answer is used. Does not own: how a profile, a role or a machine's identity is
//! turned into keys (`aws-config`), nor what is done with them.

use std::error::Error;
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
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::install_crypto;

/// How long keys are used before they are asked for again: so long does a rotation take to be seen.
const USED_FOR: Duration = Duration::from_secs(60);
/// How long before their end keys are asked for again.
const RENEWED_BEFORE: Duration = Duration::from_secs(5 * 60);
/// How long whoever knows the keys may take to tell them.
const ASK_TIME_MAX: Duration = Duration::from_secs(20);
/// How long whoever finds that keys are to be asked for again waits for newer ones, while the old ones hold: a file is
/// read by then, and a service that hangs holds up one call.
const NEWER_WAITED_FOR: Duration = Duration::from_secs(1);
/// How long a source that has failed, and of which no keys hold, is not asked again.
const FAILED_FOR: Duration = Duration::from_secs(1);
/// How long is waited after a failure before asking again, while older keys still hold, and at least after a success.
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
///
/// The source is asked by a task of its own, one at a time: neither does it matter to the others what becomes of the call
/// that was the first to find the keys old, nor is a source that takes longer than a call may never heard. Nobody waits
/// for it but who has no keys otherwise, or only such as were long due, and for a moment the first.
pub(super) struct Rotating {
    source: Arc<Source>,
    state: Arc<Mutex<State>>,
}

/// Who is asked.
struct Source {
    name: CredentialSource,
    /// Makes what asks: the SDK's own providers read a file once.
    provider: Box<dyn Fn() -> SharedCredentialsProvider + Send + Sync>,
}

#[derive(Default)]
struct State {
    newest: Option<Newest>,
    /// Why there are no keys, and since when that is known.
    failed: Option<(Instant, String)>,
    /// The task that asks, or asked last.
    asking: Option<Asking>,
}

struct Asking {
    /// Closed when it has ended.
    told: watch::Receiver<Option<Told>>,
    /// The keys of before were just due when it began: while they hold they are used until it has told.
    were_just_due: bool,
}

type Told = Result<Arc<AwsCredential>, String>;

#[derive(Clone)]
struct Newest {
    keys: Arc<AwsCredential>,
    /// When they are asked for again.
    asked_again: Instant,
    /// When they end, if they do.
    ends: Option<SystemTime>,
}

impl Newest {
    fn hold(&self) -> bool {
        self.ends.is_none_or(|ends| SystemTime::now() < ends)
    }

    fn is_due(&self, overdue: Duration) -> bool {
        self.asked_again + overdue <= Instant::now()
    }
}

/// How keys are come by.
enum Way {
    /// That is known.
    Known(Told),
    /// What is being told, or these if that takes too long.
    Asked(watch::Receiver<Option<Told>>, Option<Newest>),
}

impl Rotating {
    /// Keys from `source`; profiles are looked for in `profiles`, or where AWS programs do.
    pub(super) fn new(source: CredentialSource, profiles: Option<PathBuf>, region: &str) -> Self {
        let (name, region) = (source.clone(), region.to_owned());
        Self::of(name, move || {
            provider(&source, profiles.as_deref(), &region)
        })
    }

    fn of(
        name: CredentialSource,
        provider: impl Fn() -> SharedCredentialsProvider + Send + Sync + 'static,
    ) -> Self {
        let source = Source {
            name,
            provider: Box::new(provider),
        };
        Self {
            source: Arc::new(source),
            state: Arc::default(),
        }
    }

    fn way(&self) -> Way {
        let mut state = self.state.lock();
        let held = state.newest.clone().filter(Newest::hold);
        if let Some(held) = held.as_ref().filter(|held| !held.is_due(Duration::ZERO)) {
            return Way::Known(Ok(Arc::clone(&held.keys)));
        }
        if let Some(asking) = &state.asking
            && asking.told.has_changed().is_ok()
        {
            return match held.filter(|_| asking.were_just_due) {
                Some(held) => Way::Known(Ok(held.keys)),
                None => Way::Asked(asking.told.clone(), None),
            };
        }
        // Others may be long gone: nobody has asked since.
        let held = held.filter(|held| !held.is_due(ASK_TIME_MAX));
        if let Some((since, reason)) = &state.failed
            && since.elapsed() < FAILED_FOR
        {
            return Way::Known(Err(reason.clone()));
        }
        let (tell, told) = watch::channel(None);
        state.asking = Some(Asking {
            told: told.clone(),
            were_just_due: held.is_some(),
        });
        tokio::spawn(ask(Arc::clone(&self.source), Arc::clone(&self.state), tell));
        Way::Asked(told, held)
    }
}

/// Asks, and tells whoever waits.
async fn ask(source: Arc<Source>, state: Arc<Mutex<State>>, tell: watch::Sender<Option<Told>>) {
    let found = source.ask().await;
    let reason = found.as_ref().err().cloned();
    let told = state.lock().settle(found);
    if let (Some(reason), Ok(_)) = (reason, &told) {
        tracing::warn!(reason, "the newest keys of a store are used on");
    }
    tell.send_replace(Some(told));
}

impl Source {
    async fn ask(&self) -> Result<Credentials, String> {
        let provider = (self.provider)();
        match timeout(ASK_TIME_MAX, provider.provide_credentials()).await {
            Ok(Ok(keys)) => Ok(keys),
            Ok(Err(error)) => Err(format!(
                "{} gives no keys: {}",
                self.name,
                last_cause(&error)
            )),
            Err(_) => Err(format!(
                "{} gave no keys within {ASK_TIME_MAX:?}",
                self.name
            )),
        }
    }
}

impl State {
    /// Takes what the source has said, and answers what is used now.
    fn settle(&mut self, found: Result<Credentials, String>) -> Told {
        let now = Instant::now();
        match found {
            Ok(found) => {
                let keys = Arc::new(AwsCredential {
                    key_id: found.access_key_id().to_owned(),
                    secret_key: found.secret_access_key().to_owned(),
                    token: found.session_token().map(ToOwned::to_owned),
                });
                let ends = found.expiry();
                self.failed = None;
                self.newest = Some(Newest {
                    keys: Arc::clone(&keys),
                    // A source may go on giving the same ones until they end.
                    asked_again: now + used_for(ends, SystemTime::now()).max(ASK_AGAIN),
                    ends,
                });
                Ok(keys)
            }
            Err(reason) => {
                // A file that is just being replaced, a service that is away: what holds is used.
                if let Some(held) = self.newest.as_mut().filter(|newest| newest.hold()) {
                    held.asked_again = now + ASK_AGAIN;
                    return Ok(Arc::clone(&held.keys));
                }
                self.failed = Some((now, reason.clone()));
                Err(reason)
            }
        }
    }
}

async fn hear(told: &mut watch::Receiver<Option<Told>>) -> Told {
    match told.wait_for(Option::is_some).await {
        Ok(told) => told.clone().expect("just seen"),
        Err(_) => Err("whoever asked for keys has ended".to_owned()),
    }
}

/// The last cause of an error of the AWS SDK: what has happened. Those before it only tell where.
pub(crate) fn last_cause(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
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
        let told = match self.way() {
            Way::Known(told) => told,
            Way::Asked(mut told, None) => hear(&mut told).await,
            Way::Asked(mut told, Some(held)) => {
                match timeout(NEWER_WAITED_FOR, hear(&mut told)).await {
                    Ok(Ok(keys)) => Ok(keys),
                    _ if held.hold() => Ok(held.keys),
                    Ok(Err(reason)) => Err(reason),
                    Err(_) => hear(&mut told).await,
                }
            }
        };
        told.map_err(|reason| object_store::Error::Generic {
            store: "credentials",
            source: reason.into(),
        })
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
        write!(f, "Rotating({})", self.source.name)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use aws_credential_types::credential_fn::provide_credentials_fn;
    use aws_credential_types::provider::error::CredentialsError;

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

    /// A source that takes its time, and counts how often it is asked.
    fn slow(takes: Duration) -> (Rotating, Arc<AtomicU32>) {
        let asked = Arc::<AtomicU32>::default();
        let count = Arc::clone(&asked);
        let provider = move || {
            let n = count.fetch_add(1, Ordering::Relaxed);
            SharedCredentialsProvider::new(provide_credentials_fn(move || async move {
                tokio::time::sleep(takes).await;
                Ok(Credentials::new(
                    format!("key{n}"),
                    "hidden",
                    None,
                    None,
                    "test",
                ))
            }))
        };
        (Rotating::of(CredentialSource::Environment, provider), asked)
    }

    #[tokio::test(start_paused = true)]
    async fn source_slower_than_any_call_is_heard_and_asked_once_for_all() {
        let (keys, asked) = slow(Duration::from_secs(15));
        for _ in 0..14 {
            let call = timeout(Duration::from_secs(1), keys.get_credential());
            assert!(call.await.is_err());
        }
        let mut left_alone = Box::pin(keys.get_credential());
        assert!(futures::poll!(&mut left_alone).is_pending());
        let (one, other) = tokio::join!(keys.get_credential(), keys.get_credential());
        assert_eq!(
            (&*one.unwrap().key_id, &*other.unwrap().key_id),
            ("key0", "key0")
        );
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_hold_are_used_while_newer_ones_are_asked_for() {
        let (keys, asked) = slow(Duration::from_secs(15));
        let id = async || keys.get_credential().await.unwrap().key_id.clone();
        assert_eq!(id().await, "key0");
        tokio::time::advance(USED_FOR).await;
        let begun = Instant::now();
        // The first waits for a moment, the others for none.
        assert_eq!(id().await, "key0");
        assert_eq!(begun.elapsed(), NEWER_WAITED_FOR);
        assert_eq!(id().await, "key0");
        assert_eq!(begun.elapsed(), NEWER_WAITED_FOR);
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert_eq!(id().await, "key1");
        // Asked late, but in time: they are used until that has told, though they are long due by then.
        tokio::time::advance(USED_FOR + ASK_TIME_MAX - Duration::from_secs(5)).await;
        assert_eq!(id().await, "key1");
        tokio::time::advance(Duration::from_secs(10)).await;
        let begun = Instant::now();
        assert_eq!(id().await, "key1");
        assert_eq!(begun.elapsed(), Duration::ZERO);
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert_eq!(id().await, "key2");
        assert_eq!(asked.load(Ordering::Relaxed), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_nobody_asked_for_in_a_long_time_are_not_used_before_the_source_has_told() {
        let (keys, _) = slow(Duration::from_secs(15));
        let id = async || keys.get_credential().await.unwrap().key_id.clone();
        assert_eq!(id().await, "key0");
        tokio::time::advance(USED_FOR + ASK_TIME_MAX).await;
        let (one, other) = tokio::join!(id(), id());
        assert_eq!((&*one, &*other), ("key1", "key1"));
    }

    /// A source that gives each of these in turn, and then fails by a panic.
    fn scripted(answers: Vec<Result<Credentials, &'static str>>) -> Rotating {
        let answers = Arc::new(Mutex::new(answers.into_iter()));
        Rotating::of(CredentialSource::Environment, move || {
            let answers = Arc::clone(&answers);
            SharedCredentialsProvider::new(provide_credentials_fn(move || {
                let next = answers.lock().next();
                async move {
                    next.expect("the script is over")
                        .map_err(CredentialsError::provider_error)
                }
            }))
        })
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_have_ended_are_used_no_more_and_a_source_that_fails_is_left_alone() {
        let keys = |id: &str, ends| Ok(Credentials::new(id, "hidden", None, ends, "test"));
        let over = Some(SystemTime::now() - Duration::from_secs(1));
        let source = scripted(vec![
            keys("one", over),
            Err("it is away"),
            keys("two", None),
            Err("it is away"),
        ]);
        let id = async || source.get_credential().await.map(|k| k.key_id.clone());
        assert_eq!(id().await.unwrap(), "one");
        for _ in 0..3 {
            let error = id().await.unwrap_err().to_string();
            assert!(error.contains("it is away"), "{error}");
        }
        tokio::time::advance(FAILED_FOR).await;
        assert_eq!(id().await.unwrap(), "two");
        // It fails, and then whoever asks it dies.
        for wait in [USED_FOR, ASK_AGAIN] {
            tokio::time::advance(wait).await;
            assert_eq!(id().await.unwrap(), "two");
        }
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
        assert!(
            error.contains("not defined") && !error.contains("MissingProfile"),
            "{error}"
        );
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
