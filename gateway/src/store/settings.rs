//! Where a store is: from what the configuration says to a [`Store`].

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use quarry_config::{Secret, UploadCheck};
use url::Url;

use super::credentials::UnknownSource;
use super::{CredentialSource, FolderStore, S3Store, Store, is_key_part};

/// The region of a server other than Amazon's that was given none.
const REGION_DEFAULT: &str = "us-east-1";
/// A prefix leaves room for keys: S3 allows both together 1024 bytes.
const PREFIX_BYTES_MAX: usize = 255;

/// What the configuration says of the store, variables of the environment included.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoreSettings {
    /// `s3://bucket/prefix` or `file:///dir`.
    pub url: String,
    /// URL of an S3 server other than Amazon's.
    pub endpoint: Option<String>,
    /// The region; needed without an endpoint.
    pub region: Option<String>,
    /// Id of the access key; none: found out from the machine's role.
    pub access_key: Option<String>,
    /// The secret that belongs to it.
    pub secret_key: Option<Secret>,
    /// Token of a temporary key.
    pub session_token: Option<Secret>,
    /// Who is asked for the keys instead: see [`CredentialSource`].
    pub credentials: Option<String>,
    /// File of the profiles; none: where AWS programs look for them.
    pub credentials_file: Option<PathBuf>,
    /// The bucket in the path rather than in the host name; none: yes with an endpoint, else no.
    pub path_style: Option<bool>,
    /// What vouches for large uploads on their way.
    pub upload_check: UploadCheck,
    /// Whether a bucket or folder that is missing is made.
    pub make_missing: bool,
}

impl From<&quarry_config::Store> for StoreSettings {
    fn from(config: &quarry_config::Store) -> Self {
        Self {
            url: config.url.clone().unwrap_or_default(),
            endpoint: config.endpoint.clone(),
            region: config.region.clone(),
            access_key: config.access_key.clone(),
            secret_key: config.secret_key.clone(),
            session_token: config.session_token.clone(),
            credentials: config.credentials.clone(),
            credentials_file: config.credentials_file.clone(),
            path_style: config.path_style,
            upload_check: config.upload_check,
            make_missing: config.make_missing,
        }
    }
}

/// A bucket, how to reach it and a prefix in it: all resolved.
#[derive(Clone, Debug)]
pub struct S3Settings {
    /// The bucket's name.
    pub bucket: String,
    /// What all keys begin with, without a `/` at its ends; may be empty.
    pub prefix: String,
    /// URL of a server other than Amazon's.
    pub endpoint: Option<String>,
    /// The region.
    pub region: String,
    /// Id and secret of the access key; none: found out from the machine's role.
    pub keys: Option<(String, Secret)>,
    /// Token of a temporary key.
    pub session_token: Option<Secret>,
    /// Who is asked for keys, rather than all that; and the file of its profiles.
    pub source: Option<(CredentialSource, Option<PathBuf>)>,
    /// The bucket in the path rather than in the host name.
    pub path_style: bool,
    /// What vouches for large uploads on their way.
    pub upload_check: UploadCheck,
}

impl S3Settings {
    /// Where it is, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = format!("s3://{}", self.bucket);
        if !self.prefix.is_empty() {
            text.push('/');
            text.push_str(&self.prefix);
        }
        if let Some(endpoint) = &self.endpoint {
            text.push_str(" at ");
            text.push_str(endpoint);
        }
        text
    }
}

/// Which kind of store, and where.
#[derive(Clone, Debug)]
pub enum Place {
    /// A folder.
    Folder(PathBuf),
    /// A bucket.
    S3(S3Settings),
}

impl Place {
    /// Where it is, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Folder(path) => format!("file://{}", path.display()),
            Self::S3(s3) => s3.describe(),
        }
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL, or what goes with it, does not name a store.
    #[error("the store {url:?} cannot be used: {why}: {remedy}")]
    Settings {
        /// The URL.
        url: String,
        /// What is wrong.
        why: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Nobody is called so who could be asked for keys.
    #[error(transparent)]
    Credentials(#[from] UnknownSource),
    /// The folder cannot be used.
    #[error("the store's folder {path:?} cannot be used ({source}): {remedy}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The S3 client cannot be made.
    #[error("the store {place} cannot be used: {source}")]
    Client {
        /// Where it is.
        place: String,
        /// What the library said.
        source: object_store::Error,
    },
}

impl StoreSettings {
    /// Takes the URL apart.
    ///
    /// # Errors
    /// [`OpenError::Settings`], which names the remedy.
    pub fn place(&self) -> Result<Place, OpenError> {
        const FORM: &str = "write s3://bucket/prefix or file:///dir";
        let refuse = |why, remedy| {
            // What is in the place of a user and a password may be keys: not for a log.
            let url = if self.url.contains('@') {
                "(hidden)"
            } else {
                &self.url
            };
            let url = url.to_owned();
            OpenError::Settings { url, why, remedy }
        };
        let url = Url::parse(&self.url).map_err(|_| refuse("it is no URL", FORM))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse(
                "keys do not belong into a URL",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() || url.port().is_some() {
            return Err(refuse("it has a port, a query or a fragment", FORM));
        }
        match url.scheme() {
            "file" => match url.to_file_path() {
                Ok(path) if path != Path::new("/") => Ok(Place::Folder(path)),
                Ok(_) => Err(refuse("it is the root of the file system", "name a folder")),
                Err(()) => Err(refuse("it has a host", "write three slashes: file:///dir")),
            },
            "s3" => {
                let Some(bucket) = url.host_str().filter(|bucket| is_key_part(bucket)) else {
                    return Err(refuse("it names no bucket", "write s3://bucket/prefix"));
                };
                let prefix = url.path().trim_matches('/');
                // `..` and its disguises are gone from the parsed path already, and a piece of it.
                let is_plain = !self.url.contains("%") && !self.url.contains("/.");
                let is_good = is_plain && (prefix.is_empty() || prefix.split('/').all(is_key_part));
                if !is_good || prefix.len() > PREFIX_BYTES_MAX {
                    return Err(refuse(
                        "its prefix is not one",
                        "use letters, digits, '.', '_' and '-' between single slashes, 255 at most",
                    ));
                }
                let region = match (&self.region, &self.endpoint) {
                    (Some(region), _) => region.clone(),
                    (None, Some(_)) => REGION_DEFAULT.to_owned(),
                    (None, None) => {
                        return Err(refuse(
                            "its region is not set",
                            "set store.region or AWS_REGION",
                        ));
                    }
                };
                let keys = match (&self.access_key, &self.secret_key) {
                    (Some(id), Some(secret)) => Some((id.clone(), secret.clone())),
                    (None, None) => None,
                    _ => {
                        return Err(refuse(
                            "an access key has an id and a secret, and one is missing",
                            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                        ));
                    }
                };
                let source = self.credentials.as_deref().map(str::parse).transpose()?;
                Ok(Place::S3(S3Settings {
                    bucket: bucket.to_owned(),
                    prefix: prefix.to_owned(),
                    endpoint: self.endpoint.clone(),
                    region,
                    keys,
                    session_token: self.session_token.clone(),
                    source: source.map(|source| (source, self.credentials_file.clone())),
                    path_style: self.path_style.unwrap_or(self.endpoint.is_some()),
                    upload_check: self.upload_check,
                }))
            }
            _ => Err(refuse("it is of another kind", FORM)),
        }
    }
}

/// Opens the store that `settings` name. Nothing is asked of an S3 server yet: see
/// [`crate::provision::prepare`].
///
/// # Errors
/// [`OpenError`], which names the remedy.
pub fn open_store(settings: &StoreSettings) -> Result<Arc<dyn Store>, OpenError> {
    Ok(match settings.place()? {
        Place::Folder(path) => Arc::new(FolderStore::open(&path, settings.make_missing)?),
        Place::S3(s3) => Arc::new(S3Store::open(&s3)?),
    })
}

/// As [`open_store`], for who can wait so long at most for a folder that hangs.
///
/// # Errors
/// [`OpenError`], which names the remedy.
pub async fn open_store_within(
    settings: &StoreSettings,
    time_max: Duration,
) -> Result<Arc<dyn Store>, OpenError> {
    match settings.place()? {
        Place::Folder(path) => {
            let opened = FolderStore::open_within(&path, settings.make_missing, time_max).await?;
            Ok(Arc::new(opened))
        }
        Place::S3(_) => open_store(settings),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> StoreSettings {
        StoreSettings {
            url: url.to_owned(),
            endpoint: Some("http://127.0.0.1:8333".to_owned()),
            access_key: Some("id".to_owned()),
            secret_key: Some(Secret::new("hunter2")),
            ..StoreSettings::default()
        }
    }

    #[test]
    fn url_of_a_bucket_is_taken_apart() {
        for (url, prefix) in [("s3://b", ""), ("s3://b/", ""), ("s3://b/x/y/", "x/y")] {
            let Ok(Place::S3(s3)) = settings(url).place() else {
                panic!("{url}")
            };
            assert_eq!((s3.bucket.as_str(), s3.prefix.as_str()), ("b", prefix));
            assert!(s3.path_style);
            assert_eq!(s3.region, REGION_DEFAULT);
        }
    }

    #[test]
    fn url_of_no_store_is_refused_with_a_remedy() {
        for url in [
            "",
            "bucket",
            "s3://",
            "s3:///x",
            "s3://b//x//y",
            "s3://b/%2e%2e/x",
            "s3://b/ä",
            "s3://b?x",
            "s3://b:1/x",
            "file://host/x",
            "file:///",
            "http://b/x",
        ] {
            let error = settings(url).place().unwrap_err().to_string();
            assert!(
                error.contains("write ") || error.contains("use ") || error.contains("name a"),
                "{error}"
            );
        }
    }

    #[test]
    fn secrets_are_in_no_text() {
        let error = settings("s3://id:hunter2@b/x").place().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
        let Ok(Place::S3(s3)) = settings("s3://b/x").place() else {
            panic!()
        };
        assert_eq!(s3.describe(), "s3://b/x at http://127.0.0.1:8333");
        let store = S3Store::open(&s3).unwrap();
        let shown = format!("{s3:?} {store:?} {}", store.describe());
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn region_and_keys_missing_are_refused() {
        let without_region = StoreSettings {
            endpoint: None,
            ..settings("s3://b")
        };
        let error = without_region.place().unwrap_err().to_string();
        assert!(error.contains("store.region or AWS_REGION"), "{error}");
        let half = StoreSettings {
            secret_key: None,
            ..settings("s3://b")
        };
        let error = half.place().unwrap_err().to_string();
        assert!(error.contains("AWS_SECRET_ACCESS_KEY"), "{error}");
    }

    #[test]
    fn folder_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let settings = StoreSettings {
            make_missing: true,
            ..settings(&url)
        };
        assert_eq!(open_store(&settings).unwrap().describe(), url);
    }
}
