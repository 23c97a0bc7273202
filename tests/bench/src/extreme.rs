//! What a round of the benchmark has no time for: a volume of 1 TiB in scattered pieces, and a host that dies with 10 GiB
//! unsent.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use object_store::path::Path;
use object_store::{ObjectStoreExt as _, PutPayload};
use quarry_full_volume::{EPOCH, FRAME_SECTORS, FullVolume};
use quarry_objfmt::{Head, TenantName, VolumeId, keys};
use quarry_tests::{GIB, MIB, SECTOR, Site};
use rustix::process::{Pid, Signal, kill_process};

use crate::ceiling;
use crate::lab::{Lab, Store, peak_memory};
use crate::report::write_between_marks;
use crate::store::BUCKET;
use crate::work::fio_at;

const TENANT: &str = "acme";
const VOLUME: &str = "acme/db";
const VOLUME_LABEL: &str = "volume=\"db\"";
/// Sectors of a piece, of 16 KiB.
const PIECE_SECTORS: u32 = 32;
/// What is read again and again of the large volume: frames, each for one piece of it.
const WORKING_SET: u64 = 10 * GIB;
/// How long a daemon may take to serve a volume again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Memory beside a volume of 1 TiB in scattered pieces; time to the first read after a crash with 10 GiB unsent.
#[derive(Args)]
pub struct Arguments {
    /// `cache.ram` of the daemon with the large volume, in MiB; each in turn.
    #[arg(long, value_delimiter = ',', default_value = "256,1024")]
    ram: Vec<u64>,
    /// The large volume's size in GiB, a power of two.
    #[arg(long, default_value_t = 1024)]
    gib: u64,
    /// What is unsent when the daemon dies, in GiB.
    #[arg(long, default_value_t = 10)]
    unsent: u64,
    /// Crashes.
    #[arg(long, default_value_t = 3)]
    crashes: usize,
    /// The page whose table is written anew.
    #[arg(long)]
    write: Option<PathBuf>,
}

pub fn run(arguments: &Arguments, lab: &Lab) -> Result<()> {
    let mut text = String::from("| | wanted | found |\n|---|---|---|\n");
    for ram in &arguments.ram {
        let memory = memory(lab, arguments.gib, *ram)?;
        let mib = |bytes: u64| bytes / MIB;
        writeln!(
            text,
            "| memory beside {} GiB of 16 KiB pieces in random places, {} GiB of frames read twice, `cache.ram` {ram} MiB | at most {} MiB | {} MiB; {} with no volume, {} once it is attached; {:.1} % of the second pass from the cache |",
            arguments.gib,
            WORKING_SET / GIB,
            ram * 11 / 10,
            mib(memory.most),
            mib(memory.without),
            mib(memory.attached),
            memory.hits * 100.0
        )?;
    }
    let mut took = Vec::new();
    for _ in 0..arguments.crashes {
        took.push(crash(lab, arguments.unsent)?.as_secs_f64());
    }
    took.sort_by(f64::total_cmp);
    if let (Some(median), Some(least), Some(most)) =
        (took.get(took.len() / 2), took.first(), took.last())
    {
        writeln!(
            text,
            "| first read after a crash with {} GiB unsent | at most 2 s | {median:.2} s ({least:.2}, {most:.2}) |",
            arguments.unsent
        )?;
    }
    print!("{text}");
    match &arguments.write {
        Some(page) => write_between_marks(page, "extremes", &text),
        None => Ok(()),
    }
}

/// What a daemon has in memory, at most, in bytes.
struct Memory {
    without: u64,
    attached: u64,
    most: u64,
    /// The share of reads of the second pass that the cache had.
    hits: f64,
}

fn memory(lab: &Lab, gib: u64, ram: u64) -> Result<Memory> {
    let store = Store::start_making_up(lab)?;
    let root = lab.dir.join("large");
    let site = Site::with_environment(&root, "host", BUCKET, store.environment())?
        .cache_size(&format!("{}MiB", WORKING_SET / MIB * 6 / 5))
        .settings(&format!("[cache]\nram = \"{ram}MiB\"\n"));
    let daemon = site.start()?;
    daemon.create(VOLUME, gib * GIB, &["--compression", "none"])?;
    let id = daemon.show(VOLUME)?["id"].clone();
    let id = VolumeId::parse(id.as_str().context("no id is shown")?)?;
    eprintln!("  the map of {gib} GiB");
    fill(&store, id, gib * GIB)?;
    let pid = daemon.process_id();
    let without = peak_memory(pid)?;
    daemon.attach(VOLUME, &[])?;
    let attached = peak_memory(pid)?;
    let reads = WORKING_SET / (u64::from(FRAME_SECTORS) * SECTOR);
    let pass = || {
        // The same places in each pass, all over the volume.
        let job = [
            "--rw=randread",
            "--bs=16k",
            "--norandommap",
            "--randrepeat=1",
            &format!("--number_ios={reads}"),
        ];
        let place = daemon.uri(VOLUME)?;
        fio_at(&place, gib * GIB, 32, &job)
    };
    let hit_bytes = || daemon.count("quarry_volume_hit_bytes_total", VOLUME_LABEL);
    let (mut hits, mut most) = (0.0, 0);
    for number in 1..=2 {
        let (begun, before) = (Instant::now(), hit_bytes()?);
        pass()?;
        let read = (reads * u64::from(PIECE_SECTORS) * SECTOR) as f64;
        hits = (hit_bytes()? - before) as f64 / read;
        most = peak_memory(pid)?;
        let seconds = begun.elapsed().as_secs_f64();
        eprintln!(
            "  pass {number}: {reads} reads in {seconds:.0} s, {:.1} % hits, {} MiB at most",
            hits * 100.0,
            most / MIB
        );
    }
    daemon.stop()?;
    site.lose_host()?;
    Ok(Memory {
        without,
        attached,
        most,
        hits,
    })
}

/// Gives the volume a map whose every piece lies in a random chunk; the store makes up the chunks.
fn fill(store: &Store, id: VolumeId, size: u64) -> Result<()> {
    let client = ceiling::client(store.address())?;
    let tenant = TenantName::new(TENANT)?;
    let full = FullVolume {
        id,
        extents: size / SECTOR / u64::from(PIECE_SECTORS),
        extent_sectors: PIECE_SECTORS,
        dead_sectors: 0,
    };
    let path = |key: String| Path::from(format!("some/prefix/{key}"));
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let head = path(keys::head_key(&tenant, id));
        let there = client.get(&head).await?.bytes().await?;
        let put = async |seq, body: Vec<u8>| -> Result<()> {
            let key = path(keys::map_key(&tenant, id, EPOCH, seq));
            client.put(&key, PutPayload::from(body)).await?;
            Ok(())
        };
        let made = full.build(Head::decode(&there)?, put).await?;
        client.put(&head, PutPayload::from(made.encode())).await?;
        Ok(())
    })
}

/// From the start of a daemon to its first answer to a read, when the one before was killed with `gib` GiB unsent.
fn crash(lab: &Lab, gib: u64) -> Result<Duration> {
    let store = Store::start(lab)?;
    let root = lab.dir.join("crash");
    let site = Site::with_environment(&root, "host", BUCKET, store.environment())?
        .cache_size(&format!("{}MiB", gib * GIB / MIB * 13 / 10))
        .settings("[cache]\ndirty_max = \"80%\"\n");
    let daemon = site.start()?;
    let size = gib * 2 * GIB;
    drop(daemon.fresh_volume(VOLUME, size, &["--compression", "none"])?);
    let pid = Pid::from_raw(i32::try_from(store.pid())?).context("no process")?;
    kill_process(pid, Signal::STOP)?;
    // Each place once.
    let job = [
        "--rw=randwrite",
        "--bs=64k",
        "--randrepeat=0",
        &format!("--io_size={}", gib * GIB),
    ];
    fio_at(&daemon.uri(VOLUME)?, size, 16, &job)?;
    daemon.kill()?;
    kill_process(pid, Signal::CONT)?;
    let begun = Instant::now();
    let daemon = site.start()?;
    let first_read = || {
        daemon
            .connect(VOLUME)?
            .read_vec(0, 4096)
            .map_err(Into::into)
    };
    while let Err::<_, anyhow::Error>(error) = first_read() {
        ensure!(begun.elapsed() < PATIENCE, "not served again: {error:#}");
        std::thread::sleep(Duration::from_millis(10));
    }
    let took = begun.elapsed();
    let shown = daemon.show(VOLUME)?;
    let unsent = shown["dirty_bytes"].as_u64().context("no dirty bytes")?;
    // But for what was sent before the store was gone, and since it is back.
    let is_there = unsent >= gib * GIB * 8 / 10;
    ensure!(is_there, "{unsent} bytes are unsent after the crash");
    eprintln!(
        "  {} MiB unsent, {took:.2?} to the first read",
        unsent / MIB
    );
    daemon.kill()?;
    site.lose_host()?;
    Ok(took)
}
