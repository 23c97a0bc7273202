//! The limits of the machine: the store by a bare client that does nothing else, and the disk.

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
use crate::work::{read_fio, run_fio};

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
    runtime.block_on(of_store(lab, &store, report))?;
    of_disk(lab, report)
}

pub fn client(store: &Store) -> Result<AmazonS3> {
    builder(store).build().context("the store's client")
}

fn builder(store: &Store) -> AmazonS3Builder {
    AmazonS3Builder::new()
        .with_endpoint(format!("http://{}", store.address()))
        .with_allow_http(true)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(SECRET_KEY)
        .with_bucket_name(BUCKET)
}

/// One that has bodies checked as Quarry has them.
fn by_crc(store: &Store) -> Result<AmazonS3> {
    let builder = builder(store)
        .with_unsigned_payload(true)
        .with_checksum_algorithm(Checksum::CRC64NVME);
    builder.build().context("the store's client")
}

async fn of_store(lab: &Lab, store: &Store, report: &mut Report) -> Result<()> {
    let client = Arc::new(client(store)?);
    let count = lab.size / OBJECT;
    let path = |n: u64| Path::from(format!("raw/{n}"));
    let body = Bytes::from(vec![0x5a; usize::try_from(OBJECT)?]);
    let rate = |begun: Instant| (lab.size >> 20) as f64 / begun.elapsed().as_secs_f64();

    let by_crc = by_crc(store)?;
    for (work, client) in [
        (Work::CheckedWrite, &by_crc),
        (Work::SequentialWrite, &*client),
    ] {
        let begun = Instant::now();
        stream::iter(0..count)
            .map(|n| {
                let (path, body) = (path(n), body.clone().into());
                async move { client.put_opts(&path, body, PutOptions::default()).await }
            })
            .buffer_unordered(AT_ONCE)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        report.add(work, STORE, rate(begun));
    }

    let begun = Instant::now();
    stream::iter(0..count)
        .map(|n| {
            let client = Arc::clone(&client);
            async move { client.get(&path(n)).await?.bytes().await }
        })
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    report.add(Work::ColdSequentialRead, STORE, rate(begun));

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
    report.add(Work::ColdRead, STORE, times[RANGES / 2].as_secs_f64() * 1e6);
    let p99 = times[RANGES * 99 / 100];
    report.add(Work::ColdReadP99, STORE, p99.as_secs_f64() * 1e6);
    Ok(())
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
