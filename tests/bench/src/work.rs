//! What is done to a target, and what is told of it.
//!
//! A session: an empty volume is written at random and flushed in rounds, then written from end to end, read by hosts
//! that have nothing of it, and read and written at random while its host has it all. Writes do not compress.

use std::collections::VecDeque;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::Nbd;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::lab::{Lab, Store, cpu_time, peak_memory};
use crate::report::{Report, Work};
use crate::target::Target;

const BLOCK: u64 = 4096;
const LARGE: u64 = 1 << 20;
const DEPTH: usize = 32;
/// Large ones at once.
const LARGE_DEPTH: usize = 8;
/// Writes between two flushes.
const WRITES_A_FLUSH: usize = 32;
/// Cold reads of a block, one after the other.
const COLD_READS: usize = 500;

/// One session with a target, on a store of its own.
pub fn measure(lab: &Lab, target: &mut dyn Target, report: &mut Report) -> Result<()> {
    let mut store = Store::start(lab)?;
    target.start(&store)?;
    let name = target.name();
    let mut random = StdRng::seed_from_u64(7);
    let mut noise = vec![0; 64 << 20];
    random.fill(&mut noise[..]);
    let mut client = Client {
        nbd: target.connect()?,
        random,
        noise,
        size: lab.size,
    };

    let rounds = client.flush_rounds(lab, target, &mut store)?;
    report.add(Work::FlushRounds, name, rounds.writes_a_second);
    report.add(Work::Flush, name, rounds.flush.as_secs_f64() * 1e3);
    if target.has_store() {
        report.add(Work::Amplification, name, rounds.uploaded_a_byte);
        target.flush_to_store(true)?;
        client.nbd = target.connect()?;
        let rounds = client.flush_rounds(lab, target, &mut store)?;
        report.add(Work::FlushRoundsObject, name, rounds.writes_a_second);
        report.add(Work::PutsAFlush, name, rounds.puts_a_flush);
        target.flush_to_store(false)?;
        client.nbd = target.connect()?;
    }

    let begun = Instant::now();
    client.fill()?;
    target.drain()?;
    report.add(Work::SequentialWrite, name, mib_a_second(lab.size, begun));

    // Of all its processes: a lost host's is another.
    let mut most = 0;
    if target.has_store() {
        most = most.max(peak_memory(target.pid()?)?);
        target.lose_host(&store)?;
        client.nbd = target.connect()?;
        let (median, p99) = client.cold_reads()?;
        report.add(Work::ColdRead, name, median.as_secs_f64() * 1e6);
        report.add(Work::ColdReadP99, name, p99.as_secs_f64() * 1e6);
        most = most.max(peak_memory(target.pid()?)?);
        target.lose_host(&store)?;
        client.nbd = target.connect()?;
        // By fio's own clock: it takes some 0.3 s to start and to end.
        let reads_a_second = fio_read_all(lab, target)?;
        let mib_a_read = (LARGE >> 20) as f64;
        report.add(Work::ColdSequentialRead, name, reads_a_second * mib_a_read);
    }

    // Into whatever caches it has, and the kernel's.
    fio_read_all(lab, target)?;
    let before = cpu_time(target.pid()?)?;
    let (iops, reads) = fio_warm_reads(lab, target)?;
    report.add(Work::WarmRead, name, iops);
    let cpu = cpu_time(target.pid()?)? - before;
    report.add(Work::ReadCpu, name, micros_each(cpu, reads));

    let before = cpu_time(target.pid()?)?;
    let (iops, written) = fio_writes(lab, target)?;
    let begun = Instant::now();
    client.nbd.flush()?;
    let took = written as f64 / iops + begun.elapsed().as_secs_f64();
    report.add(Work::RandomWrite, name, written as f64 / took);
    target.drain()?;
    let cpu = cpu_time(target.pid()?)? - before;
    report.add(Work::WriteCpu, name, micros_each(cpu, written));
    most = most.max(peak_memory(target.pid()?)?);
    report.add(Work::Memory, name, (most >> 10) as f64 / 1024.0);
    Ok(())
}

pub fn mib_a_second(bytes: u64, begun: Instant) -> f64 {
    (bytes >> 20) as f64 / begun.elapsed().as_secs_f64()
}

fn micros_each(time: Duration, count: u64) -> f64 {
    time.as_secs_f64() * 1e6 / count.max(1) as f64
}

/// Reads of a block a second, and how many they were.
fn fio_warm_reads(lab: &Lab, target: &dyn Target) -> Result<(f64, u64)> {
    let ran = fio(
        lab,
        target,
        DEPTH,
        &["--rw=randread", "--bs=4k", "--norandommap"],
        true,
    )?;
    read_fio(&ran, "read")
}

/// Writes of a block a second, and how many they were; not flushed.
fn fio_writes(lab: &Lab, target: &dyn Target) -> Result<(f64, u64)> {
    let job = [
        "--rw=randwrite",
        "--bs=4k",
        "--norandommap",
        "--randrepeat=0",
    ];
    read_fio(&fio(lab, target, DEPTH, &job, true)?, "write")
}

/// Large reads a second of all of the volume, from its start to its end.
fn fio_read_all(lab: &Lab, target: &dyn Target) -> Result<f64> {
    let ran = fio(lab, target, LARGE_DEPTH, &["--rw=read", "--bs=1m"], false)?;
    read_fio(&ran, "read").map(|(reads_a_second, _)| reads_a_second)
}

/// A job of fio's own NBD engine, for the lab's time or once over the volume.
fn fio(lab: &Lab, target: &dyn Target, depth: usize, job: &[&str], timed: bool) -> Result<Output> {
    let (socket, export) = target.address()?;
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    let runtime = format!("--runtime={}", lab.time.as_secs());
    let mut job = job.to_vec();
    if timed {
        job.extend(["--time_based", &runtime]);
    }
    fio_at(&uri, lab.size, depth, &job)
}

/// A job at the NBD address `uri`, over `size` bytes.
pub fn fio_at(uri: &str, size: u64, depth: usize, job: &[&str]) -> Result<Output> {
    let place = [
        "--ioengine=nbd".to_owned(),
        format!("--uri={uri}"),
        format!("--iodepth={depth}"),
        format!("--size={size}"),
    ];
    run_fio(place.iter().map(String::as_str).chain(job.iter().copied()))
}

/// A job, given all that is its own.
pub fn run_fio<'a>(job: impl IntoIterator<Item = &'a str>) -> Result<Output> {
    let ran = Command::new("fio")
        .args(["--name=job", "--output-format=json"])
        .args(job)
        .output()
        .context("fio (apt-get install fio)")?;
    ensure!(ran.status.success(), "{}", said(&ran));
    Ok(ran)
}

fn said(ran: &Output) -> String {
    let [out, err] = [&ran.stdout, &ran.stderr].map(|text| String::from_utf8_lossy(text));
    format!("fio: {out}{err}")
}

/// Operations a second of a job of fio, and how many.
pub fn read_fio(ran: &Output, kind: &str) -> Result<(f64, u64)> {
    let text = String::from_utf8_lossy(&ran.stdout);
    let complaint = || said(ran);
    let json = &text[text.find('{').with_context(complaint)?..];
    let told: serde_json::Value = serde_json::from_str(json).with_context(complaint)?;
    let job = &told["jobs"][0][kind];
    let iops = job["iops"].as_f64().with_context(complaint)?;
    let count = job["total_ios"].as_u64().with_context(complaint)?;
    Ok((iops, count))
}

/// What rounds of writes and a flush showed.
struct Rounds {
    writes_a_second: f64,
    /// The mean.
    flush: Duration,
    uploaded_a_byte: f64,
    puts_a_flush: f64,
}

/// One connection, and what it writes.
struct Client {
    nbd: Nbd,
    random: StdRng,
    /// What is written is cut out of it.
    noise: Vec<u8>,
    size: u64,
}

impl Client {
    /// Bytes that differ from write to write.
    fn cut(&mut self, len: u64) -> std::ops::Range<usize> {
        let len = usize::try_from(len).expect("a write is small");
        let from = self.random.random_range(0..self.noise.len() - len);
        from..from + len
    }

    /// `count` requests, so many at once; `send` begins the next one.
    fn run(
        &mut self,
        depth: usize,
        mut count: impl FnMut(u64) -> bool,
        mut send: impl FnMut(&mut Self, u64) -> Result<u64>,
    ) -> Result<u64> {
        let mut under_way = VecDeque::with_capacity(depth);
        let mut sent = 0;
        while count(sent) {
            if under_way.len() == depth
                && let Some(oldest) = under_way.pop_front()
            {
                self.nbd.wait(oldest)?;
            }
            under_way.push_back(send(self, sent)?);
            sent += 1;
        }
        for cookie in under_way {
            self.nbd.wait(cookie)?;
        }
        Ok(sent)
    }

    fn fill(&mut self) -> Result<()> {
        let count = self.size / LARGE;
        self.run(
            LARGE_DEPTH,
            |sent| sent < count,
            |client, sent| {
                let data = client.cut(LARGE);
                Ok(client
                    .nbd
                    .send_write(sent * LARGE, &client.noise[data], false)?)
            },
        )?;
        Ok(self.nbd.flush()?)
    }

    fn send_random_write(&mut self) -> Result<u64> {
        let at = self.random.random_range(0..self.size / BLOCK) * BLOCK;
        let data = self.cut(BLOCK);
        Ok(self.nbd.send_write(at, &self.noise[data], false)?)
    }

    fn flush_rounds(
        &mut self,
        lab: &Lab,
        target: &mut dyn Target,
        store: &mut Store,
    ) -> Result<Rounds> {
        target.drain()?;
        let before = store.counts()?;
        let (mut flushes, mut flushing) = (0_u64, Duration::ZERO);
        let begun = Instant::now();
        while begun.elapsed() < lab.time {
            let is_due = |sent| sent < WRITES_A_FLUSH as u64;
            self.run(DEPTH, is_due, |client, _| client.send_random_write())?;
            let asked = Instant::now();
            self.nbd.flush()?;
            flushing += asked.elapsed();
            flushes += 1;
        }
        let took = begun.elapsed().as_secs_f64();
        let flushed = store.counts()?;
        target.drain()?;
        let after = store.counts()?;
        let writes = (flushes * WRITES_A_FLUSH as u64) as f64;
        Ok(Rounds {
            writes_a_second: writes / took,
            flush: flushing / u32::try_from(flushes)?,
            uploaded_a_byte: (after.put_bytes - before.put_bytes) as f64 / (writes * BLOCK as f64),
            puts_a_flush: (flushed.puts - before.puts) as f64 / flushes as f64,
        })
    }

    /// The median and the 99th percentile of reads, each alone, of places that were not read before.
    fn cold_reads(&mut self) -> Result<(Duration, Duration)> {
        let mut times = Vec::with_capacity(COLD_READS);
        for _ in 0..COLD_READS {
            let at = self.random.random_range(0..self.size / BLOCK) * BLOCK;
            let asked = Instant::now();
            self.nbd.read_vec(at, BLOCK)?;
            times.push(asked.elapsed());
        }
        times.sort_unstable();
        Ok((times[COLD_READS / 2], times[COLD_READS * 99 / 100]))
    }
}
