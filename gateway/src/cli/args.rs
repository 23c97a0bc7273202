//! The flags, and the help that explains them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use quarry_config::Size;
use quarry_objfmt::{
    Compression, Durability, KeyName, Suspended, TenantName, VolumeId, VolumeName,
};

use super::bundle::BundleFlags;
use super::csi::CsiFlags;
use super::limit::bandwidth;
use super::tenant_args::TenantArgs;
use super::top::TopFlags;
use super::warm::Span;
use crate::control::{
    DeviceMode, DeviceOwner, ImageRef, SnapRef, TokenRole, TrashRef, Via, VolumeRef,
};
use crate::engine::now_ms;
use crate::image::ImageFormat;
use crate::image::copy::JOBS_MAX;
use crate::moment::{Moment, NoMoment};

/// Where the help has the options that every command takes: behind a command's own.
const GENERAL: &str = "General options";

/// Block devices whose data live in object storage.
#[derive(Debug, Parser)]
#[command(name = "quarry", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// The daemon's unix socket; given here, it wins over the variable of --url.
    #[arg(
        long,
        global = true,
        help_heading = GENERAL,
        env = "QUARRY_SOCKET",
        hide_env_values = true,
        value_name = "PATH"
    )]
    pub socket: Option<PathBuf>,
    /// The daemon's API on the network, rather than its socket; of the two variables, this one's wins.
    #[arg(
        long,
        global = true,
        help_heading = GENERAL,
        env = "QUARRY_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    pub url: Option<String>,
    /// File with the token for it.
    #[arg(
        long,
        global = true,
        help_heading = GENERAL,
        env = "QUARRY_TOKEN_FILE",
        hide_env_values = true,
        value_name = "FILE"
    )]
    pub token_file: Option<PathBuf>,
    /// File with the authorities of its certificate, rather than those that the system trusts.
    #[arg(
        long,
        global = true,
        help_heading = GENERAL,
        env = "QUARRY_CA",
        hide_env_values = true,
        value_name = "FILE"
    )]
    pub ca: Option<PathBuf>,
    /// Form of what is printed.
    #[arg(
        long,
        global = true,
        help_heading = GENERAL,
        value_enum,
        default_value_t = Format::Text,
        value_name = "FORM"
    )]
    pub output: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  quarry demo
  quarry serve --store s3://bucket/prefix --cache /var/lib/quarry/cache --cache-size 64GiB
  quarry tenant create acme
  quarry volume create acme/db --size 100GiB
  quarry volume attach acme/db
  quarry volume show acme/db --output json

Clients find the daemon by --socket or QUARRY_SOCKET (default /run/quarry/quarry.sock), or, from elsewhere, by --url,
--token-file and --ca, or QUARRY_URL, QUARRY_TOKEN_FILE and QUARRY_CA. A flag wins over every variable; of the variables,
QUARRY_URL wins over QUARRY_SOCKET.

Exit codes: 0 done, 1 failed, 2 the command makes no sense, 78 the configuration cannot be used.";

/// Form of what is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show in a minute what Quarry does, without root, kernel modules or a cloud account.
    Demo(DemoFlags),
    /// Run the daemon.
    Serve(Box<ServeFlags>),
    /// Make, list and delete tenants.
    #[command(subcommand, after_help = "Example:\n  quarry tenant create acme")]
    Tenant(TenantCommand),
    /// Make, list and revoke the tokens that the API over the network asks for.
    #[command(subcommand, after_help = TOKEN_EXAMPLES)]
    Token(TokenCommand),
    /// Make, use and delete volumes.
    #[command(subcommand, after_help = VOLUME_EXAMPLES)]
    Volume(VolumeCommand),
    /// Keep states of volumes: make, list and delete snapshots.
    #[command(subcommand, after_help = SNAPSHOT_EXAMPLES)]
    Snapshot(SnapshotCommand),
    /// Look at and purge deleted volumes.
    #[command(subcommand, after_help = TRASH_EXAMPLES)]
    Trash(TrashCommand),
    /// Make keys for a keyring.
    #[command(
        subcommand,
        after_help = "Example:\n  quarry key generate acme-2026 >> /etc/quarry/keyring"
    )]
    Key(KeyCommand),
    /// Look for what is not as it should be around the daemon, and say what to change; it changes nothing.
    Doctor,
    /// Show how the daemon does; fails if it is not ready.
    #[command(after_help = "Example:\n  quarry status --output json")]
    Status,
    /// Show what the volumes attached to the daemon's host do, again and again; Ctrl-C ends it.
    #[command(after_help = TOP_EXAMPLES)]
    Top(TopFlags),
    /// Gather what somebody who helps needs to know, without secrets, in one archive; the daemon need not run.
    #[command(after_help = "\
Example:
  journalctl -u quarry --since -1d > quarry.log && quarry support-bundle --log quarry.log")]
    SupportBundle(BundleFlags),
    /// Serve Kubernetes' Container Storage Interface by this host's daemon; see docs/KUBERNETES.md.
    #[command(after_help = CSI_EXAMPLES)]
    Csi(CsiFlags),
    /// Check a configuration file, or print one to start from.
    #[command(
        subcommand,
        after_help = "Example:\n  quarry config example > quarry.toml"
    )]
    Config(ConfigCommand),
    /// Print a shell's completion script.
    #[command(after_help = "Example:\n  quarry completions bash > /etc/bash_completion.d/quarry")]
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

const CSI_EXAMPLES: &str = "\
Examples:
  quarry csi --endpoint unix:///csi/csi.sock --services node
  quarry csi --endpoint unix:///csi/csi.sock --services controller --peers https://{host}:9443 --token-file operator.token";

const TOP_EXAMPLES: &str = "\
Examples:
  quarry top --sort latency
  quarry top --once --interval 5s --output json

Rates and times are of the interval. By --url and a tenant's token, it shows that tenant's volumes.";

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Print a line for a keyring, with a new key; needs no daemon.
    Generate {
        /// What the key is to be called.
        name: KeyName,
    },
}

/// Flags of `quarry demo`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  quarry demo --input disk.img")]
pub struct DemoFlags {
    /// A disk image to store and read back, instead of one made up.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
}

/// Flags of `quarry serve`; they win over the file.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  quarry serve --config /etc/quarry/quarry.toml
  AWS_ENDPOINT_URL=http://127.0.0.1:8333 quarry serve --store s3://bucket/prefix
  quarry serve --data-dir ./state --store file:///srv/quarry --socket ./quarry.sock

S3 endpoint, region and keys come from the file or the standard AWS_* variables.")]
pub struct ServeFlags {
    /// The configuration file; `quarry config example` prints one.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory for what this host keeps itself.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The object store: s3://bucket/prefix or file:///dir.
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// File or block device of the cache.
    #[arg(long, value_name = "PATH")]
    pub cache: Option<PathBuf>,
    /// How much of it to use, such as 1GiB.
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<Size>,
    /// TCP address of /metrics, /healthz, /readyz and, for this host, the status page.
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// TCP address of the NBD server.
    #[arg(long, value_name = "ADDR")]
    pub nbd_listen: Option<SocketAddr>,
    /// Folder in memory for what must outlive the daemon; the same at every start.
    #[arg(long, value_name = "DIR")]
    pub journal_dir: Option<PathBuf>,
    /// Take over from the daemon that runs at the same socket: everything is prepared first, then it is
    /// stopped, and the devices that it served go on here.
    #[arg(long)]
    pub replace: bool,
    /// With --replace: go on in the background, and answer when the new daemon serves.
    #[arg(long, requires = "replace")]
    pub background: bool,
}

/// What to do with tenants.
#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Make a tenant; its store is looked at first.
    #[command(after_help = TENANT_EXAMPLES)]
    Create {
        /// Its name.
        tenant: TenantName,
        #[command(flatten)]
        settings: TenantArgs,
    },
    /// List all tenants.
    List,
    /// Show a tenant: what it may have, has, and asked of its store.
    Show {
        /// Its name.
        tenant: TenantName,
    },
    /// Change what a tenant may have; what is not named stays, and `none` takes a limit away.
    ///
    /// Another way to its store (endpoint, region, credentials) is for what is attached from then on; another endpoint must have all of its
    /// volumes.
    #[command(after_help = TENANT_EXAMPLES)]
    Update {
        /// Its name.
        tenant: TenantName,
        #[command(flatten)]
        settings: TenantArgs,
    },
    /// Hold a tenant's volumes up on all hosts, within a minute.
    Suspend {
        /// Its name.
        tenant: TenantName,
        /// Its devices refuse writes (`read-only`), or all their requests wait (`stall`).
        #[arg(long, value_name = "HOW", default_value = "read-only", value_parser = suspended)]
        how: Suspended,
    },
    /// Let a suspended tenant's volumes go on.
    Resume {
        /// Its name.
        tenant: TenantName,
    },
    /// Delete a tenant that has no volumes.
    Delete {
        /// Its name.
        tenant: TenantName,
        /// Purge its deleted volumes, which else keep it.
        #[arg(long)]
        purge: bool,
    },
}

const TOKEN_EXAMPLES: &str = "\
Examples:
  umask 077; quarry token create --tenant acme --role admin --expires 90d > acme.token
  umask 077; quarry token create --operator --note \"the scheduler\" > operator.token
  quarry token list --tenant acme
  quarry token revoke acme.k3j2h4m5n6p7q2r3";

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token, and print it; it cannot be had again.
    #[command(group = ArgGroup::new("bearer").args(["tenant", "operator"]).required(true))]
    Create {
        /// The tenant that its bearer acts for.
        #[arg(long, requires = "role")]
        tenant: Option<TenantName>,
        /// What its bearer may do with what is the tenant's.
        #[arg(long, value_enum, requires = "tenant")]
        role: Option<TokenRole>,
        /// Let its bearer do everything, to all tenants.
        #[arg(long, conflicts_with_all = ["tenant", "role"])]
        operator: bool,
        /// When it ends, from now on, such as 90d; never, if that is not said.
        #[arg(long, value_name = "TIME", value_parser = span_ms)]
        expires: Option<u64>,
        /// What it is for.
        #[arg(long, value_name = "TEXT")]
        note: Option<String>,
    },
    /// List tokens, without their secrets.
    List {
        /// Only this tenant's.
        #[arg(long)]
        tenant: Option<TenantName>,
    },
    /// Take a token back: at once on the daemon's host, within 30 s on others.
    Revoke {
        /// Its id, as in `quarry token list`.
        token: String,
    },
}

const TENANT_EXAMPLES: &str = "\
Examples:
  quarry tenant create acme --max-bytes 10TiB --max-volumes 50 --iops 20000 --bandwidth 500MiB/s
  quarry tenant create acme --store s3://acme-volumes/q --region eu-central-1 --credentials profile:acme
  quarry tenant update acme --max-bytes 20TiB --iops none";

const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  quarry snapshot create acme/db@nightly
  quarry snapshot list acme/db
  quarry volume attach acme/db@nightly
  quarry volume clone acme/db@nightly acme/test
  quarry volume rollback acme/db@nightly
  quarry snapshot delete acme/db@nightly";

fn suspended(text: &str) -> Result<Suspended, String> {
    match text {
        "read-only" => Ok(Suspended::ReadOnly),
        "stall" => Ok(Suspended::Stall),
        _ => Err("write read-only or stall".to_owned()),
    }
}

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Give a volume's state a name, while it is in use; all that was acknowledged before is in it.
    Create {
        /// The snapshot, as tenant/volume@snapshot.
        snapshot: SnapRef,
    },
    /// List snapshots, the oldest first.
    List {
        /// Only this volume's.
        volume: Option<VolumeRef>,
    },
    /// Show all about a snapshot, with the volumes cloned from it.
    Show {
        /// The snapshot, as tenant/volume@snapshot.
        snapshot: SnapRef,
    },
    /// Delete a snapshot that has no clones.
    Delete {
        /// The snapshot, as tenant/volume@snapshot.
        snapshot: SnapRef,
    },
}

const VOLUME_EXAMPLES: &str = "\
Examples:
  quarry volume create acme/db --size 100GiB
  quarry volume attach acme/db --via nbd
  quarry volume resize acme/db 200GiB
  quarry volume retain acme/db 24h
  quarry volume sync acme/db
  quarry volume import disk.qcow2 acme/db
  quarry volume export acme/db disk.qcow2
  quarry volume detach acme/db";

/// What to do with volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume; it reads as zeroes and takes no space.
    #[command(
        after_help = "Example:\n  quarry volume create acme/db --size 100GiB --compression zstd"
    )]
    Create(CreateFlags),
    /// Attach a volume to the daemon's host, and print its device or address.
    #[command(after_help = "\
Examples:
  quarry volume attach acme/db
  nbdinfo \"$(quarry volume attach acme/db --via nbd --output json | jq -r .uri)\"
  quarry volume attach acme/db --owner qemu:kvm --mode 0660
  quarry volume attach acme/db --force
  quarry volume attach acme/db@nightly
  quarry volume attach acme/db --at -2h

A snapshot, or the volume as it was at a time, is attached for reading only, on any number of hosts, beside the
volume. The latter is called acme/db@2026-11-25T03:00:00Z from then on.")]
    Attach(AttachFlags),
    /// List volumes.
    List {
        /// Only this tenant's.
        #[arg(long)]
        tenant: Option<TenantName>,
    },
    /// Show all about a volume, or about a snapshot as it is attached.
    Show {
        /// The volume, as tenant/name, or the snapshot.
        volume: ImageRef,
    },
    /// Make a volume that starts as a snapshot is, at once; the snapshot's volume may be in use.
    #[command(after_help = "Example:\n  quarry volume clone acme/db@golden acme/test1")]
    Clone {
        /// The snapshot, as tenant/volume@snapshot.
        snapshot: SnapRef,
        /// The new volume, of the same tenant.
        volume: VolumeRef,
    },
    /// Make a detached volume what its snapshot is; what was written since is lost, snapshots are not.
    #[command(after_help = "\
Example:
  quarry snapshot create acme/db@before && quarry volume rollback acme/db@nightly")]
    Rollback {
        /// The snapshot, as tenant/volume@snapshot.
        snapshot: SnapRef,
    },
    /// Make a volume larger, attached here or nowhere, while it is in use; or a detached one smaller.
    ///
    /// What lies behind the end of a smaller size is lost, so shrink the file system first. Snapshots keep
    /// their own size and data.
    #[command(after_help = "\
Examples:
  quarry volume resize acme/db 200GiB && resize2fs /dev/quarry/acme/db
  quarry volume detach acme/db && quarry volume resize acme/db 50GiB --force")]
    Resize {
        /// The volume, as tenant/name.
        volume: VolumeRef,
        /// Its new size, up to 1EiB.
        size: Size,
        /// Take a size that is smaller: what lies behind it is lost.
        #[arg(long)]
        force: bool,
    },
    /// Set how long what a volume was stays to be opened with `attach --at`, attached here or nowhere.
    #[command(after_help = "\
Example:
  quarry volume retain acme/db 24h

What is older goes soon after, and does not come back when more is kept again. 0s keeps nothing.")]
    Retain {
        /// The volume, as tenant/name.
        volume: VolumeRef,
        /// How long, such as 24h.
        #[arg(value_name = "TIME", value_parser = span_ms)]
        retain: u64,
    },
    /// Set how fast a volume may be used, wherever it is attached; at once here, within minutes on other hosts.
    #[command(after_help = "\
Examples:
  quarry volume limit acme/db --iops 5000 --bandwidth 200MiB/s
  quarry volume limit acme/db --none

What is not said is not limited any more. Discards, zeroes and flushes count as requests of no bytes; a read by
NBD of more than 1 MiB as one for each MiB.")]
    Limit(LimitFlags),
    /// Wrap a volume's data key by another key, at once, attached here or nowhere; its data stay as they are. Or give it
    /// another data key.
    #[command(after_help = "\
Examples:
  quarry volume rekey acme/db --key acme-2027
  quarry volume rekey acme/db --data

Clones have keys of their own: wrap theirs too before a key is taken out of the keyring.

With --data, what is written from now on is encrypted with a new data key. While the volume is attached, what is there is encrypted
anew by compaction, and the earlier key is dropped when nothing is encrypted with it any more (`quarry volume show`). A
snapshot keeps what it needs, and its key, until it is deleted; a clone what it has of its parent, until it is flattened.")]
    Rekey {
        /// The volume, as tenant/name.
        volume: VolumeRef,
        /// The key; by default the tenant's.
        #[arg(long, value_name = "NAME")]
        key: Option<KeyName>,
        /// Make a new data key too.
        #[arg(long)]
        data: bool,
    },
    /// Wait until all that was written so far is in the object store.
    Sync {
        /// The volume, as tenant/name.
        volume: VolumeRef,
    },
    /// Fetch what the cache lacks of an attached volume into it; Ctrl-C ends it.
    #[command(after_help = "Example:\n  quarry volume warm acme/db --range 0-10GiB --limit 2GiB")]
    Warm(WarmFlags),
    /// Drop what this host's cache has of a volume and the object store has too.
    Evict {
        /// The volume, as tenant/name.
        volume: VolumeRef,
    },
    /// Put the data of an attached volume in order in the object store, so that reading it through is fast again
    /// after scattered writes; Ctrl-C ends it. The daemon itself only moves what is mostly overwritten.
    #[command(after_help = "Example:\n  quarry volume compact acme/db")]
    Compact {
        /// The volume, as tenant/name.
        volume: VolumeRef,
        /// Move also what its snapshots need, which then takes its space twice.
        #[arg(long)]
        held: bool,
    },
    /// Copy what an attached clone needs of its parent, so that the parent's snapshot can be deleted.
    #[command(after_help = "Example:\n  quarry volume flatten acme/test1")]
    Flatten {
        /// The clone, as tenant/name.
        volume: VolumeRef,
    },
    /// Upload all that was written, then take the volume off this host.
    #[command(after_help = "\
One that waits to be attached again after a start is attached first. Of one that cannot be, nothing is uploaded: its device is
removed, though it be in use, and what the cache kept stays there.")]
    Detach {
        /// The volume, as tenant/name, or the snapshot.
        volume: ImageRef,
    },
    /// Copy a disk image into a volume: raw, qcow2, vmdk, vhdx, vdi and what else QEMU's programs read.
    #[command(after_help = "\
Examples:
  quarry volume import disk.qcow2 acme/db
  quarry volume import disk.img acme/db --size 200GiB --compression zstd
  zstdcat disk.img.zst | quarry volume import - acme/db --size 100GiB

Cut off, the same command goes on where it stopped, but for standard input. The volume must be empty, or is
made so with --overwrite. An image that names other files, such as a backing file, is refused.")]
    Import(ImportFlags),
    /// Copy a volume, or a snapshot, into a disk image.
    #[command(after_help = "\
Examples:
  quarry volume export acme/db disk.qcow2
  quarry volume export acme/db --at -2h disk.qcow2
  quarry volume export acme/db - | zstd > disk.img.zst

The image has its name when it is whole. A volume that is written to meanwhile gives an image of no single
moment: detach it, stop its users, or export a snapshot or a time.")]
    Export(ExportFlags),
    /// Check a volume in the object store, attached or not: what is wrong, and where.
    #[command(after_help = "\
Examples:
  quarry volume verify acme/db
  quarry volume verify acme/db --deep --output json

Fails if anything is wrong. What a host has not sent to the store yet is not looked at. One volume of a tenant
at a time on each host, three of all; more are refused.")]
    Verify {
        /// The volume, as tenant/name, or a snapshot.
        volume: ImageRef,
        /// Read every byte that the volume needs, not only what names it.
        #[arg(long)]
        deep: bool,
        /// Check each of its snapshots too.
        #[arg(long)]
        snapshots: bool,
    },
    /// Take a volume from a host that is lost, and give it to nobody: who attaches it next needs no --force.
    #[command(after_help = "\
Example:
  quarry volume release acme/db --from node-3

Who attaches it next fences that host, whose writes go into the volume no more from then on; until then it may still add to it. What
it has not sent by then is not in the volume. If it comes back, it is to detach the volume. One that is attached on the daemon's own host is
detached instead, which loses nothing.")]
    Release {
        /// The volume, as tenant/name.
        volume: VolumeRef,
        /// The host that is lost, by its name or its cache's id, as `quarry volume show` tells its owner.
        #[arg(long, value_name = "HOST")]
        from: String,
    },
    /// Make a volume's lost or damaged head anew from its other objects; without --apply, say what it would be.
    #[command(after_help = "\
Examples:
  quarry volume rescue acme/db
  quarry volume rescue acme/db --size 100GiB --sector-size 512 --durability local --compression lz4 --apply

Stop every host that had the volume attached first. What is in no other object must be given.")]
    Rescue(RescueFlags),
    /// Delete a detached volume: it goes into the trash, and its data stay for the grace period.
    Delete {
        /// The volume, as tenant/name.
        volume: VolumeRef,
        /// Give up writes that are in this host's cache and never reached the object store.
        #[arg(long)]
        discard_unsent: bool,
    },
    /// Bring a deleted volume back from the trash.
    #[command(after_help = "Example:\n  quarry volume restore acme/db --as db-old")]
    Restore {
        /// The volume, as tenant/name, or its id.
        volume: TrashRef,
        /// What it is to be called; by default what it was.
        #[arg(long = "as", value_name = "NAME")]
        name: Option<VolumeName>,
    },
}

const TRASH_EXAMPLES: &str = "\
Examples:
  quarry trash list
  quarry trash purge --older-than 3d";

/// What to do with deleted volumes.
#[derive(Debug, Subcommand)]
pub enum TrashCommand {
    /// List deleted volumes that can be restored.
    List {
        /// Only this tenant's.
        #[arg(long)]
        tenant: Option<TenantName>,
    },
    /// Delete the data of deleted volumes now, for ever.
    Purge(PurgeFlags),
}

/// Flags of `quarry trash purge`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("which").required(true).args(["id", "all", "older_than"])))]
pub struct PurgeFlags {
    /// The volume's id; `quarry trash list` shows it.
    #[arg(value_name = "UUID", value_parser = trashed)]
    pub id: Option<VolumeId>,
    /// All that are in the trash.
    #[arg(long)]
    pub all: bool,
    /// Those that were deleted so long ago or longer, such as 3d.
    #[arg(long, value_name = "TIME", value_parser = span)]
    pub older_than: Option<Duration>,
    /// Only this tenant's.
    #[arg(long)]
    pub tenant: Option<TenantName>,
}

/// Flags of `quarry volume warm`.
#[derive(Debug, Args)]
pub struct WarmFlags {
    /// The volume, as tenant/name.
    pub volume: VolumeRef,
    /// Only this part of it.
    #[arg(long, value_name = "FIRST-END")]
    pub range: Option<Span>,
    /// Fetch no more than this; by default as much as the cache device has.
    #[arg(long, value_name = "SIZE")]
    pub limit: Option<Size>,
}

/// Flags of `quarry volume create`.
#[derive(Debug, Args)]
pub struct CreateFlags {
    /// The volume, as tenant/name.
    pub volume: VolumeRef,
    /// Its size, up to 1EiB.
    #[arg(long)]
    pub size: Size,
    /// How long what it was stays to be opened with `attach --at`, such as 24h.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = span_ms)]
    pub retain: u64,
    /// How fast it may be used.
    #[command(flatten)]
    pub rates: RateFlags,
    /// All else.
    #[command(flatten)]
    pub shape: ShapeFlags,
}

/// Flags of `quarry volume limit`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("limits").args(["iops", "bandwidth", "none"]).required(true).multiple(true))]
pub struct LimitFlags {
    /// The volume, as tenant/name.
    pub volume: VolumeRef,
    /// How fast it may be used.
    #[command(flatten)]
    pub rates: RateFlags,
    /// As fast as can be.
    #[arg(long, conflicts_with_all = ["iops", "iops_burst", "bandwidth", "bandwidth_burst"])]
    pub none: bool,
}

/// Flags of how fast something may be used.
#[derive(Clone, Copy, Debug, Args)]
pub struct RateFlags {
    /// Requests a second.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub iops: Option<u64>,
    /// Requests that may come at once after a rest; by default what a tenth of a second brings.
    #[arg(long, value_name = "COUNT", requires = "iops", value_parser = clap::value_parser!(u64).range(1..))]
    pub iops_burst: Option<u64>,
    /// Bytes read and written a second, such as 200MiB/s.
    #[arg(long, value_name = "SIZE/s", value_parser = bandwidth)]
    pub bandwidth: Option<Size>,
    /// Bytes that may come at once after a rest; by default what a tenth of a second brings.
    #[arg(long, value_name = "SIZE", requires = "bandwidth")]
    pub bandwidth_burst: Option<Size>,
}

/// Flags of a volume that is made.
#[derive(Clone, Debug, Args)]
pub struct ShapeFlags {
    /// Its logical block size.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = sector_size())]
    pub sector_size: u32,
    /// What a flush waits for: the cache device here, or the object store.
    #[arg(long, default_value = "local", value_name = "WHERE", value_parser = durability())]
    pub durability: Durability,
    /// How its data are compressed in the store.
    #[arg(long, default_value = "lz4", value_name = "HOW", value_parser = compression())]
    pub compression: Compression,
    /// Encrypt it, its data key wrapped by this key; by default by the tenant's, if that has one.
    #[arg(long, value_name = "NAME", conflicts_with = "no_encryption")]
    pub key: Option<KeyName>,
    /// Do not encrypt it, though the tenant has a key.
    #[arg(long)]
    pub no_encryption: bool,
}

/// Flags of `quarry volume import`.
#[derive(Debug, Args)]
pub struct ImportFlags {
    /// The image: a file, a block device, or - for the bytes of a disk from standard input.
    pub image: PathBuf,
    /// The volume, as tenant/name; made if it is not there.
    pub volume: VolumeRef,
    /// What the image is; by default told by its first bytes, which for a raw image its user chose.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<ImageFormat>,
    /// Size of a volume that is made; by default the image's.
    #[arg(long)]
    pub size: Option<Size>,
    /// Lose what is in the volume, and what an import that was cut off has done.
    #[arg(long)]
    pub overwrite: bool,
    /// Leave the volume attached, by NBD.
    #[arg(long)]
    pub attach: bool,
    /// Requests of 1MiB at once.
    #[arg(long, value_name = "COUNT", default_value = "16", value_parser = jobs())]
    pub jobs: usize,
    /// Of a volume that is made.
    #[command(flatten)]
    pub shape: ShapeFlags,
}

/// Flags of `quarry volume export`.
#[derive(Debug, Args)]
pub struct ExportFlags {
    /// The volume, as tenant/name, or a snapshot.
    pub volume: ImageRef,
    /// The image to make, or - to write the bytes of the disk to standard output.
    pub image: PathBuf,
    /// As it was at this time (2026-11-25T03:00:00Z, or -2h), if that is kept.
    #[arg(long, value_name = "TIME", value_parser = moment, allow_hyphen_values = true)]
    pub at: Option<Moment>,
    /// What to make: raw, qcow2, vmdk, vhdx, vdi…; by default by the image's name, or raw.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<ImageFormat>,
    /// Replace a file of that name.
    #[arg(long)]
    pub force: bool,
    /// Requests of 1MiB at once.
    #[arg(long, value_name = "COUNT", default_value = "16", value_parser = jobs())]
    pub jobs: usize,
}

fn jobs() -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u64)
        .range(1..=JOBS_MAX as u64)
        .map(|jobs| usize::try_from(jobs).unwrap_or(1))
}

fn sector_size() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["512", "4096"]).try_map(|text| text.parse())
}

fn durability() -> impl TypedValueParser<Value = Durability> {
    PossibleValuesParser::new(["local", "object"]).map(|text| {
        if text == "object" {
            Durability::Object
        } else {
            Durability::Local
        }
    })
}

fn compression() -> impl TypedValueParser<Value = Compression> {
    PossibleValuesParser::new(["lz4", "zstd", "none"]).try_map(|text| text.parse())
}

/// Flags of `quarry volume rescue`.
#[derive(Debug, Args)]
pub struct RescueFlags {
    /// The volume, as tenant/name.
    pub volume: VolumeRef,
    /// Its id, if its name is lost too.
    #[arg(long, value_name = "UUID", value_parser = VolumeId::parse)]
    pub id: Option<VolumeId>,
    /// Write the head.
    #[arg(long)]
    pub apply: bool,
    /// The size that it had, or more.
    #[arg(long)]
    pub size: Option<Size>,
    /// Its logical block size.
    #[arg(long, value_name = "BYTES", value_parser = sector_size())]
    pub sector_size: Option<u32>,
    /// What a flush waits for: the cache device here, or the object store.
    #[arg(long, value_name = "WHERE", value_parser = durability())]
    pub durability: Option<Durability>,
    /// How its data are compressed from now on.
    #[arg(long, value_name = "HOW", value_parser = compression())]
    pub compression: Option<Compression>,
}

/// Flags of `quarry volume attach`.
#[derive(Debug, Args)]
pub struct AttachFlags {
    /// The volume, as tenant/name, or a snapshot.
    pub volume: ImageRef,
    /// For reading, as it was at this time (2026-11-25T03:00:00Z, or -2h), if that is kept; see `volume retain`.
    ///
    /// All in it was acknowledged by then; of what was, the last seconds may be missing, which were on their
    /// way to the object store. When it is kept no longer, reads of it fail.
    #[arg(long, value_name = "TIME", value_parser = moment, allow_hyphen_values = true)]
    pub at: Option<Moment>,
    /// A block device (ublk) or a network block device; by default a block device if the kernel can.
    #[arg(long, value_enum, value_name = "HOW")]
    pub via: Option<Via>,
    /// Take it over from the host that has it, which then can write no more.
    #[arg(long)]
    pub force: bool,
    /// Give up writes that are in this host's cache and never reached the object store.
    #[arg(long)]
    pub discard_unsent: bool,
    /// Give up writes that are in this host's cache and come after one that the cache device has lost, or may have lost when a
    /// sync of it failed.
    #[arg(long)]
    pub discard_lost: bool,
    /// Take no writes.
    #[arg(long)]
    pub read_only: bool,
    /// Queues of the block device, 1 to 16 and no more than CPUs: for one that many CPUs use at once.
    #[arg(long, value_name = "COUNT")]
    pub queues: Option<u16>,
    /// Whose the block device is to be, now and after restarts: names or numbers of the daemon's host.
    #[arg(long, value_name = "USER[:GROUP]")]
    pub owner: Option<DeviceOwner>,
    /// The block device's permission bits, now and after restarts, such as 0640.
    #[arg(long, value_name = "OCTAL")]
    pub mode: Option<DeviceMode>,
    /// Have the kernel receive what the cache lacks straight into the reader's pages.
    ///
    /// Such data are not copied by the daemon, and so neither verified by their checksums nor kept in the
    /// cache. For ublk devices of volumes with `--compression none`, a store on plain http, and Linux
    /// 7.2 or later; `quarry volume show` tells whether it is so. Sequential reads, and what does not
    /// work out, go through the daemon.
    #[arg(long)]
    pub direct_reads: bool,
    /// See that it is attached: if it is already, leave it as it is; and wait for the daemon, and for the store, if they
    /// do not answer yet.
    #[arg(long, conflicts_with_all = ["at", "force", "discard_unsent", "discard_lost"])]
    pub ensure: bool,
}

fn trashed(text: &str) -> Result<VolumeId, &'static str> {
    VolumeId::parse(text).map_err(|_| "give its id, as `quarry trash list` shows")
}

fn span(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "write a time such as 24h".to_owned())
}

/// A span of time, in milliseconds.
fn span_ms(text: &str) -> Result<u64, String> {
    let span = span(text)?;
    match u64::try_from(span.as_millis()) {
        // Which would mean nothing at all.
        Ok(0) if !span.is_zero() => Err("that is less than a millisecond".to_owned()),
        ms => ms.map_err(|_| "that is too long".to_owned()),
    }
}

fn moment(text: &str) -> Result<Moment, NoMoment> {
    Moment::parse(text, now_ms())
}

/// What to do with configuration files.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a file.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Print a file that documents every key.
    Example,
}
