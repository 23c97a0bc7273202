//! `quarry csi`.

use clap::Args;
use quarry_config::LogFormat;

use super::{Failure, logging, serve};
use crate::control::Client;
use crate::csi::{Endpoint, Peers, Services, Settings};

/// Flags of `quarry csi`.
#[derive(Debug, Args)]
pub struct CsiFlags {
    /// The unix socket to serve at.
    #[arg(
        long,
        env = "CSI_ENDPOINT",
        hide_env_values = true,
        value_name = "unix:///PATH"
    )]
    pub endpoint: Endpoint,
    /// What to serve: what makes and moves volumes, what mounts them on this node, or both.
    #[arg(long, value_enum, default_value_t = Services::All, value_name = "WHICH")]
    pub services: Services,
    /// How the controller reaches the daemons of other hosts, `{host}` being a host's name: what is attached is
    /// snapshotted, and grown at once, by the host that has it. The token of --token-file and the authorities of
    /// --ca are for them too.
    #[arg(long, value_name = "URL")]
    pub peers: Option<String>,
    /// Where this node is, and the volumes that are made here can be used; the same keys everywhere. Can be given
    /// several times.
    #[arg(long, value_name = "KEY=SEGMENT", value_parser = segment)]
    pub topology: Vec<(String, String)>,
    /// How the log is written.
    #[arg(long, default_value = "human", value_name = "FORM", value_parser = log_format)]
    pub log: LogFormat,
}

fn segment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, segment)) if !key.is_empty() && !segment.is_empty() => {
            Ok((key.to_owned(), segment.to_owned()))
        }
        _ => Err("write KEY=SEGMENT, such as topology.csi.quarry.storage/zone=a".to_owned()),
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "human" => Ok(LogFormat::Human),
        "json" => Ok(LogFormat::Json),
        _ => Err("write human or json".to_owned()),
    }
}

/// Serves until it is told to end.
pub(super) fn run(
    flags: CsiFlags,
    client: Client,
    token: Option<&str>,
    ca: Option<&str>,
) -> Result<(), Failure> {
    let CsiFlags {
        endpoint,
        services,
        peers,
        topology,
        log,
    } = flags;
    logging::start(log, "info")?;
    if peers.is_some() && token.is_some() && ca.is_none() {
        // Any of the world's authorities would do else, for a name that comes from an object of a tenant's store.
        let message =
            "--peers would send the token to whichever hosts volumes name as their owners";
        let remedy = "name the authority that made the daemons' certificates, with --ca";
        return Err(Failure::new("invalid", message, remedy));
    }
    let reach = |address: String| Peers::new(&address, token.map(str::trim), ca.map(str::as_bytes));
    let settings = Settings {
        endpoint,
        services,
        client,
        peers: peers.map(reach).transpose()?,
        topology: topology.into_iter().collect(),
    };
    serve::on_runtime(crate::csi::run(settings))
}
