//! `quarry serve`: configuration, log and runtime; then the daemon takes over.

use std::future::Future;
use std::path::PathBuf;

use quarry_config::{Config, Overrides};

use super::args::ServeFlags;
use super::{Failure, logging};
use crate::reactor::set_io_flusher;

/// Runs the daemon until it is told to stop.
pub(super) fn run(flags: ServeFlags, socket: Option<PathBuf>) -> Result<(), Failure> {
    let (replace, background) = (flags.replace, flags.background);
    let config = configure(flags, socket, |name| std::env::var(name).ok())?;
    if background {
        return super::background::run(&config.daemon.socket);
    }
    logging::start(config.daemon.log, &config.daemon.log_filter)?;
    for note in config.notes() {
        tracing::warn!("{note}");
    }
    crate::daemon::bound_heaps();
    on_runtime(crate::daemon::run(config, replace))
}

/// The file, the flags and the variables as one.
fn configure(
    flags: ServeFlags,
    socket: Option<PathBuf>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Config, Failure> {
    let ServeFlags {
        config,
        data_dir,
        store,
        cache,
        cache_size,
        listen,
        nbd_listen,
        journal_dir,
        replace: _,
        background: _,
    } = flags;
    let file = match config {
        Some(path) => Config::load(&path)?,
        None => Config::default(),
    };
    let flags = Overrides {
        data_dir,
        store_url: store,
        cache_path: cache,
        cache_size,
        socket,
        listen,
        nbd_listen,
        journal_dir,
    };
    Ok(file.complete(flags, env)?)
}

/// Runs `work` on a runtime of as many threads as there are CPUs.
pub(super) fn on_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("tokio")
        // What is uploaded, and fetched, the kernel may be waiting for.
        .on_thread_start(set_io_flusher)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| {
        Failure::new(
            "internal",
            format!("cannot start: {error}"),
            "raise the limits of this process",
        )
    })?;
    let result = runtime.block_on(work);
    // What is still being encoded or written nobody waits for: it is as if the process had died a
    // moment earlier, while the users of its devices wait for the next one.
    runtime.shutdown_background();
    Ok(result?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser as _;

    use super::super::{Cli, Command};
    use super::*;

    fn configured(args: &[&str]) -> Result<Config, Failure> {
        let cli = Cli::try_parse_from(args).unwrap();
        let Command::Serve(flags) = cli.command else {
            panic!("not serve")
        };
        configure(*flags, cli.socket, |name| {
            (name == "AWS_REGION").then(|| "eu-west-1".to_owned())
        })
    }

    #[test]
    fn serve_flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("quarry.toml");
        std::fs::write(
            &file,
            "[daemon]\nsocket = \"/file.sock\"\nlog = \"json\"\n[store]\nurl = \"s3://file\"\n",
        )
        .unwrap();
        let file = file.to_str().unwrap();
        let config = configured(&[
            "quarry",
            "serve",
            "--config",
            file,
            "--data-dir",
            "/d",
            "--store",
            "file:///s",
            "--cache",
            "/c",
            "--cache-size",
            "1GiB",
            "--socket",
            "/flag.sock",
            "--listen",
            "127.0.0.1:9464",
        ])
        .unwrap();
        assert_eq!(config.daemon.socket, Path::new("/flag.sock"));
        assert_eq!(config.daemon.log, quarry_config::LogFormat::Json);
        assert_eq!(config.store.url.as_deref(), Some("file:///s"));
        assert_eq!(config.store.region.as_deref(), Some("eu-west-1"));
        assert_eq!(config.cache_path(), Path::new("/c"));
        assert_eq!(
            config.cache.size.map(quarry_config::Size::bytes),
            Some(1 << 30)
        );
    }

    #[test]
    fn serve_without_a_store_says_how_to_name_one() {
        let failure = configured(&["quarry", "serve", "--socket", "/s"]).unwrap_err();
        assert_eq!(failure.kind, "config");
        assert!(failure.remedy.contains("--store s3://"), "{failure}");
    }
}
