//! No size limit: an exbibyte costs no more time and memory than a gibibyte.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Result, ensure};
use quarry_tests::{MIB, Site, TIB, in_time};
use tempfile::tempdir;

const VOLUME: &str = "acme/huge";
const EXBIBYTE: u64 = 1 << 60;
/// The longest trim that NBD can ask for, in whole blocks: 4 GiB less one block.
const TRIM: u32 = u32::MAX - 4095;
/// Trims under way at once, as a kernel would have them.
const TRIMS_AT_ONCE: usize = 64;

#[test]
fn exbibyte_is_created_attached_written_and_reopened_in_seconds_and_megabytes() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    // The first volume pays for buffers and pools that any volume has.
    drop(daemon.fresh_volume("acme/small", 64 * MIB, &[])?);
    let before = daemon.resident_bytes()?;
    let mut nbd = in_time("create and attach", Duration::from_secs(2), || {
        daemon.fresh_volume(VOLUME, EXBIBYTE, &[])
    })?;
    ensure!(nbd.size() == EXBIBYTE);
    let last = EXBIBYTE - 4096;
    nbd.write(last, &[0xee; 4096], false)?;
    nbd.write(EXBIBYTE / 2, &[0xdd; 4096], true)?;
    ensure!(nbd.read_vec(last - 4096, 8192)? == [[0; 4096], [0xee; 4096]].concat());
    let grown = daemon.resident_bytes()?.saturating_sub(before);
    println!("resident memory grew by {grown} bytes");
    ensure!(
        grown < 16 * MIB,
        "an exbibyte costs {grown} bytes of memory"
    );
    drop(nbd);
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;

    let daemon = site.start()?;
    let mut nbd = in_time("attach again", Duration::from_secs(2), || {
        daemon.attach(VOLUME, &["--force"])
    })?;
    ensure!(nbd.read_vec(last, 4096)? == [0xee; 4096], "the last block");
    ensure!(nbd.read_vec(EXBIBYTE / 2, 4096)? == [0xdd; 4096]);
    ensure!(
        nbd.read_vec(EXBIBYTE / 4, MIB)?
            .iter()
            .all(|byte| *byte == 0)
    );
    daemon.stop()
}

#[test]
fn sixteen_tebibytes_are_trimmed_in_two_seconds_and_stay_trimmed() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, EXBIBYTE, &[])?;
    let places = [0, TIB, 7 * TIB + 4096, 16 * TIB - 4096];
    for place in places {
        nbd.write(place, &[1; 4096], false)?;
    }
    nbd.write(16 * TIB, &[2; 4096], false)?;
    daemon.sync(VOLUME)?;
    let before = daemon.resident_bytes()?;
    in_time("16 TiB of trims", Duration::from_secs(2), || {
        let mut under_way = VecDeque::new();
        let mut at = 0;
        while at < 16 * TIB {
            let len = u64::from(TRIM).min(16 * TIB - at);
            under_way.push_back(nbd.send_trim(at, u32::try_from(len)?)?);
            at += len;
            if under_way.len() == TRIMS_AT_ONCE
                && let Some(oldest) = under_way.pop_front()
            {
                nbd.wait(oldest)?;
            }
        }
        for cookie in under_way {
            nbd.wait(cookie)?;
        }
        Ok(nbd.flush()?)
    })?;
    let grown = daemon.resident_bytes()?.saturating_sub(before);
    ensure!(grown < 16 * MIB, "the trims cost {grown} bytes of memory");
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    let mut nbd = daemon.attach(VOLUME, &["--force"])?;
    for place in places {
        ensure!(nbd.read_vec(place, 4096)? == [0; 4096], "{place} is back");
    }
    ensure!(nbd.read_vec(16 * TIB, 4096)? == [2; 4096], "one too many");
    daemon.stop()
}
