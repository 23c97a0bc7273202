//! A place where one daemon lives: its directories, its socket, its store and its settings.
//!
//! A site outlives its daemons: starting one again on the same site is a restart.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::command::quarry_program;
use crate::{Daemon, Ran, SeaweedFs, free_port};

/// Everything that a daemon is started with.
#[derive(Clone, Debug)]
pub struct Site {
    root: PathBuf,
    store: String,
    cache_size: String,
    listen: SocketAddr,
    environment: Vec<(String, String)>,
    settings: Option<String>,
    cache: Option<PathBuf>,
    data: Option<PathBuf>,
}

impl Site {
    /// A site in the directory `root`, which is made, over the store at the URL `store`.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn new(root: &Path, store: &str) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| root.display().to_string())?;
        Ok(Self {
            root: root.to_path_buf(),
            store: store.to_owned(),
            cache_size: "256MiB".to_owned(),
            listen: SocketAddrV4::new(Ipv4Addr::LOCALHOST, free_port()).into(),
            environment: Vec::new(),
            settings: None,
            cache: None,
            data: None,
        })
    }

    /// A site in `root/NAME` over a folder store in `root/store`, which sites of one `root` share.
    ///
    /// # Errors
    /// If a directory cannot be made.
    pub fn with_folder(root: &Path, name: &str) -> Result<Self> {
        let store = root.join("store");
        fs::create_dir_all(&store)?;
        Self::new(&root.join(name), &format!("file://{}", store.display()))
    }

    /// A site in `root/NAME` over the bucket `bucket` of a SeaweedFS, reached at `address` (its own, or
    /// that of a proxy before it).
    ///
    /// # Errors
    /// If a directory cannot be made.
    pub fn with_s3(
        root: &Path,
        name: &str,
        server: &SeaweedFs,
        address: SocketAddr,
        bucket: &str,
    ) -> Result<Self> {
        let environment = server.client_environment(address);
        Self::with_environment(root, name, bucket, environment)
    }

    /// A site in `root/NAME` over the bucket `bucket` of the server that `environment` leads to.
    ///
    /// # Errors
    /// If a directory cannot be made.
    pub fn with_environment(
        root: &Path,
        name: &str,
        bucket: &str,
        environment: Vec<(String, String)>,
    ) -> Result<Self> {
        let mut site = Self::new(&root.join(name), &format!("s3://{bucket}/some/prefix"))?;
        site.environment = environment;
        Ok(site)
    }

    /// With a cache of this size, such as `64MiB`.
    #[must_use]
    pub fn cache_size(mut self, size: &str) -> Self {
        size.clone_into(&mut self.cache_size);
        self
    }

    /// With its cache here.
    #[must_use]
    pub fn cache_at(mut self, path: &Path) -> Self {
        self.cache = Some(path.to_owned());
        self
    }

    /// With its data folder here.
    #[must_use]
    pub fn data_at(mut self, path: &Path) -> Self {
        self.data = Some(path.to_owned());
        self
    }

    /// With its metrics at this address.
    #[must_use]
    pub fn listen_at(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// Over the store at this URL.
    #[must_use]
    pub fn store(mut self, url: &str) -> Self {
        url.clone_into(&mut self.store);
        self
    }

    /// With this variable in its daemon's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With this TOML as its configuration file.
    #[must_use]
    pub fn settings(mut self, toml: &str) -> Self {
        self.settings = Some(toml.to_owned());
        self
    }

    /// Where everything of this site lies.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The cache file.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        let here = || self.root.join("cache");
        self.cache.clone().unwrap_or_else(here)
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        let here = || self.root.join("data");
        self.data.clone().unwrap_or_else(here)
    }

    /// The daemon's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.root.join("q.sock")
    }

    /// Where it answers for its metrics.
    #[must_use]
    pub const fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// What the daemons printed.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// Starts a daemon here and waits until it is ready.
    ///
    /// # Errors
    /// With the end of its log, if it does not come up.
    pub fn start(&self) -> Result<Daemon> {
        Daemon::start(self.clone())
    }

    /// Starts a daemon here that must give up by itself, and answers with its words.
    ///
    /// # Errors
    /// If it succeeded.
    pub fn serve_refused(&self) -> Result<Ran> {
        self.refused(&[])
    }

    /// As [`Site::serve_refused`], of one that is to replace the one that serves.
    ///
    /// # Errors
    /// If it succeeded.
    pub fn replace_refused(&self) -> Result<Ran> {
        self.refused(&["--replace"])
    }

    /// As [`Site::replace_refused`], by the command that a service's reload is.
    ///
    /// # Errors
    /// If it succeeded.
    pub fn reload_refused(&self) -> Result<Ran> {
        self.refused(&["--replace", "--background"])
    }

    fn refused(&self, flags: &[&str]) -> Result<Ran> {
        let ran = Ran::run(self.server()?.args(flags))?;
        ensure!(
            ran.code.is_some_and(|code| code != 0),
            "did not fail: {ran}"
        );
        Ok(ran)
    }

    /// Throws away the cache and all that the host remembers, as if the host had burnt down.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn lose_host(&self) -> Result<()> {
        for path in [self.cache(), self.data()] {
            let gone = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            match gone {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| path.display().to_string());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Calls `quarry ARGUMENTS` as a client of this site.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn quarry(&self, arguments: &[&str]) -> Result<Ran> {
        Ran::run(&mut self.command(arguments))
    }

    /// Calls `quarry ARGUMENTS --output json`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn quarry_json(&self, arguments: &[&str]) -> Result<Ran> {
        Ran::run(self.command(arguments).args(["--output", "json"]))
    }

    /// The command `quarry ARGUMENTS` as a client of this site, whose user's state is in it too.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = clean_quarry();
        command
            .env("QUARRY_SOCKET", self.socket())
            .env("XDG_STATE_HOME", self.state())
            .args(arguments);
        command
    }

    /// Where its clients keep what they must remember.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// The command that starts the daemon.
    pub(crate) fn server(&self) -> Result<Command> {
        let mut command = clean_quarry();
        command.arg("serve");
        if let Some(settings) = &self.settings {
            let file = self.root.join("quarry.toml");
            fs::write(&file, settings)?;
            command.arg("--config").arg(file);
        }
        command
            .arg("--data-dir")
            .arg(self.data())
            .args(["--store", &self.store])
            .arg("--cache")
            .arg(self.cache())
            .args(["--cache-size", &self.cache_size])
            .arg("--socket")
            .arg(self.socket())
            .arg("--journal-dir")
            .arg(self.root.join("journal"))
            .args(["--listen", &self.listen.to_string()])
            .envs(self.environment.iter().cloned())
            .env("RUST_BACKTRACE", "1");
        Ok(command)
    }
}

/// `quarry` without any setting of the person who runs the tests.
fn clean_quarry() -> Command {
    let mut command = Command::new(quarry_program());
    for (name, _) in std::env::vars_os() {
        let foreign = name
            .to_str()
            .is_some_and(|name| name.starts_with("AWS_") || name.starts_with("QUARRY_"));
        if foreign {
            command.env_remove(name);
        }
    }
    command
}
