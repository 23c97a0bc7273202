//! The limits of the machine: the store by a bare client that does nothing else, and the disk.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::aws::{AmazonS3, AmazonS3Builder, Checksum};
use object_store::path::Path;
use object_store::{ObjectStore as _, ObjectStoreExt as _, PutOptions};

use crate::lab::{Lab, Store};
use crate::report::{Report, Work};
use crate::store::{ACCESS_KEY, BUCKET, SECRET_KEY};
use crate::work::{mib_a_second, read_fio, run_fio};

/// The row of the store's own figures.
pub const STORE: &str = "store";
/// The row of the disk's.
pub const DISK: &str = "disk";

/// As large as Quarry's chunks, and as many at once.
const OBJECT: u64 = 8 << 20;
const AT_ONCE: usize = 16;
const RANGES: usize = 500;

pub fn measure(lab: &Lab, report: &mut Report) -> Result<()> {
    let store = Store::start(lab)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(of_store(lab.size, store.address(), report))?;
    of_disk(lab, report)
}

/// What a bare client reads of the store at `address`, where it wrote `size` bytes before.
pub fn reads(address: SocketAddr, size: u64) -> Result<Reads> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let client = client(address)?;
        put_all(&client, size).await?;
        read(client, size).await
    })
}

pub fn client(address: SocketAddr) -> Result<AmazonS3> {
    builder(address).build().context("the store's client")
}

fn builder(address: SocketAddr) -> AmazonS3Builder {
    AmazonS3Builder::new()
        .with_endpoint(format!("http://{address}"))
        .with_allow_http(true)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(SECRET_KEY)
        .with_bucket_name(BUCKET)
}

/// One that has bodies checked as Quarry has them.
fn by_crc(address: SocketAddr) -> Result<AmazonS3> {
    let builder = builder(address)
        .with_unsigned_payload(true)
        .with_checksum_algorithm(Checksum::CRC64NVME);
    builder.build().context("the store's client")
}

/// What a bare client reads.
pub struct Reads {
    /// Whole objects, many at once.
    pub mib_a_second: f64,
    /// Of a range of 4 KiB, one after the other.
    pub median: Duration,
    /// Of the same.
    pub p99: Duration,
}

async fn of_store(size: u64, address: SocketAddr, report: &mut Report) -> Result<()> {
    let client = client(address)?;
    for (work, client) in [
        (Work::CheckedWrite, &by_crc(address)?),
        (Work::SequentialWrite, &client),
    ] {
        let begun = Instant::now();
        put_all(client, size).await?;
        report.add(work, STORE, mib_a_second(size, begun));
    }
    let reads = read(client, size).await?;
    report.add(Work::ColdSequentialRead, STORE, reads.mib_a_second);
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    report.add(Work::ColdRead, STORE, micros(reads.median));
    report.add(Work::ColdReadP99, STORE, micros(reads.p99));
    Ok(())
}

fn path(n: u64) -> Path {
    Path::from(format!("raw/{n}"))
}

async fn put_all(client: &AmazonS3, size: u64) -> Result<()> {
    let body = Bytes::from(vec![0x5a; usize::try_from(OBJECT)?]);
    stream::iter(0..size / OBJECT)
        .map(|n| {
            let (path, body) = (path(n), body.clone().into());
            async move { client.put_opts(&path, body, PutOptions::default()).await }
        })
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    Ok(())
}

async fn read(client: AmazonS3, size: u64) -> Result<Reads> {
    let client = Arc::new(client);
    let count = size / OBJECT;
    let begun = Instant::now();
    stream::iter(0..count)
        .map(|n| {
            let client = Arc::clone(&client);
            async move { client.get(&path(n)).await?.bytes().await }
        })
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let mib_a_second = mib_a_second(size, begun);

    let mut times: Vec<Duration> = Vec::with_capacity(RANGES);
    for n in 0..RANGES as u64 {
        let from = n * 4096 % OBJECT;
        let asked = Instant::now();
        client
            .get_range(&path(n % count), from..from + 4096)
            .await?;
        times.push(asked.elapsed());
    }
    times.sort_unstable();
    Ok(Reads {
        mib_a_second,
        median: times[RANGES / 2],
        p99: times[RANGES * 99 / 100],
    })
}

fn of_disk(lab: &Lab, report: &mut Report) -> Result<()> {
    for (work, mode, kind) in [
        (Work::RandomWrite, "randwrite", "write"),
        (Work::WarmRead, "randread", "read"),
    ] {
        let ran = run_fio([
            "--ioengine=io_uring",
            "--direct=1",
            "--bs=4k",
            "--iodepth=32",
            "--time_based",
            "--end_fsync=1",
            &format!("--rw={mode}"),
            &format!("--filename={}", lab.dir.join("disk").display()),
            &format!("--size={}", lab.size),
            &format!("--runtime={}", lab.time.as_secs()),
        ])?;
        report.add(work, DISK, read_fio(&ran, kind)?.0);
    }
    Ok(std::fs::remove_file(lab.dir.join("disk"))?)
}
