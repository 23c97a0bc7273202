//! Other people's programs on a Quarry volume: libnbd's, QEMU's and fio.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Ran, Site, Tool, test_number, tool};
use serde_json::Value;
use tempfile::tempdir;

const VOLUME: &str = "acme/tools";

/// A file of random bytes with holes and runs of one byte in it.
fn image(path: &Path, size: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let mut file = File::create(path)?;
    let mut written = 0;
    for kind in (0..4).cycle() {
        let piece = (3 * MIB + 4096 * kind).min(size - written);
        match kind {
            3 => io::copy(&mut io::repeat(0).take(piece), &mut file)?,
            2 => io::copy(&mut io::repeat(0x5a).take(piece), &mut file)?,
            _ => io::copy(&mut random.by_ref().take(piece), &mut file)?,
        };
        written += piece;
        if written == size {
            break;
        }
    }
    Ok(())
}

fn started(dir: &Path, size: u64) -> Result<Daemon> {
    let site = Site::with_folder(dir, "a")?.cache_size("128MiB");
    let daemon = site.start()?;
    drop(daemon.fresh_volume(VOLUME, size, &[])?);
    Ok(daemon)
}

fn run(tool: &Tool, arguments: &[&str]) -> Result<Ran> {
    Ran::run(tool.command().args(arguments))?.ok()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is plain")
}

/// Compares two big files without reading them into memory.
fn same_files(one: &Path, other: &Path) -> Result<()> {
    let cmp = tool("cmp").context("cmp is everywhere")?;
    run(&cmp, &[text(one), text(other)]).map(drop)
}

#[test]
fn nbdinfo_of_a_volume_tells_its_geometry() -> Result<()> {
    let Some(nbdinfo) = tool("nbdinfo") else {
        return Ok(());
    };
    let dir = tempdir()?;
    let daemon = started(dir.path(), 100 * MIB)?;
    let told = run(&nbdinfo, &["--json", &daemon.uri(VOLUME)?])?;
    let told: Value = serde_json::from_str(&told.stdout)?;
    let export = &told["exports"][0];
    assert_eq!(export["export-name"], VOLUME);
    assert_eq!(export["export-size"], 100 * MIB);
    for can in [
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_multi_conn",
    ] {
        assert_eq!(export[can], true, "{can}: {told}");
    }
    assert_eq!(export["is_read_only"], false);
    let uri = daemon.uri(VOLUME)?;
    let (_, socket) = uri.split_once("?socket=").context("a socket")?;
    let all = format!("nbd+unix:///?socket={socket}");
    let listed = run(&nbdinfo, &["--list", "--json", &all])?;
    assert!(listed.stdout.contains(VOLUME), "{listed}");
    daemon.stop()
}

#[test]
fn nbdinfo_map_of_a_volume_shows_what_was_written() -> Result<()> {
    let Some(nbdinfo) = tool("nbdinfo") else {
        return Ok(());
    };
    let dir = tempdir()?;
    let daemon = started(dir.path(), 1 << 40)?;
    let site = daemon.site().clone();
    let mut nbd = daemon.connect(VOLUME)?;
    nbd.write(5 * MIB, &[1; 8192], false)?;
    nbd.write((1 << 40) - 4096, &[1; 4096], false)?;
    drop(nbd);
    let map = |daemon: &Daemon| -> Result<Vec<(u64, u64, u64)>> {
        let told = run(&nbdinfo, &["--map", "--json", &daemon.uri(VOLUME)?])?;
        let told: Vec<Value> = serde_json::from_str(&told.stdout)?;
        let number = |run: &Value, key: &str| run[key].as_u64().context("a number");
        let run = |run| {
            let kind = number(run, "type")?;
            Ok((number(run, "offset")?, number(run, "length")?, kind))
        };
        told.iter().map(run).collect()
    };
    let last = (1 << 40) - 4096;
    let expected = [
        (0, 5 * MIB, 3),
        (5 * MIB, 8192, 0),
        (5 * MIB + 8192, last - 5 * MIB - 8192, 3),
        (last, 4096, 0),
    ];
    ensure!(map(&daemon)? == expected, "{:?}", map(&daemon)?);
    // The same from the store alone.
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    drop(daemon.attach(VOLUME, &["--force"])?);
    ensure!(map(&daemon)? == expected, "{:?}", map(&daemon)?);
    daemon.stop()
}

#[test]
fn nbdcopy_in_and_out_after_losing_the_host_is_the_same() -> Result<()> {
    let Some(nbdcopy) = tool("nbdcopy") else {
        return Ok(());
    };
    let size = test_number("QUARRY_TEST_IMAGE_MIB", 256) * MIB;
    let dir = tempdir()?;
    let (original, back) = (dir.path().join("original"), dir.path().join("back"));
    image(&original, size)?;
    let daemon = started(dir.path(), size)?;
    let parallel = ["--connections=4", "--requests=64"];
    let uri = daemon.uri(VOLUME)?;
    let copy_in = [&parallel[..], &["--flush", text(&original), &uri]].concat();
    run(&nbdcopy, &copy_in)?;
    daemon.sync(VOLUME)?;
    let site = daemon.site().clone();
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    drop(daemon.attach(VOLUME, &["--force"])?);
    let uri = daemon.uri(VOLUME)?;
    run(&nbdcopy, &[&parallel[..], &[&uri, text(&back)]].concat())?;
    same_files(&original, &back)?;
    daemon.stop()
}

#[test]
fn qemu_img_converts_in_and_out_and_compares_equal() -> Result<()> {
    let Some(qemu_img) = tool("qemu-img") else {
        return Ok(());
    };
    let dir = tempdir()?;
    let (original, back) = (dir.path().join("original"), dir.path().join("back.qcow2"));
    image(&original, 96 * MIB)?;
    let daemon = started(dir.path(), 96 * MIB)?;
    let uri = daemon.uri(VOLUME)?;
    let onto = [
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        text(&original),
        &uri,
    ];
    run(&qemu_img, &onto)?;
    let compare = ["compare", "-f", "raw", "-F", "raw", text(&original), &uri];
    run(&qemu_img, &compare)?;
    run(
        &qemu_img,
        &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&back)],
    )?;
    run(
        &qemu_img,
        &[
            "compare",
            "-f",
            "qcow2",
            "-F",
            "raw",
            text(&back),
            text(&original),
        ],
    )?;
    daemon.stop()
}

#[test]
fn fio_verifies_what_it_wrote() -> Result<()> {
    let Some(fio) = tool("fio") else {
        return Ok(());
    };
    let engines = run(&fio, &["--enghelp"])?;
    if !engines.stdout.contains("nbd") {
        quarry_tests::skip("this fio has no nbd engine");
        return Ok(());
    }
    let dir = tempdir()?;
    let daemon = started(dir.path(), 128 * MIB)?;
    let uri = format!("--uri={}", daemon.uri(VOLUME)?);
    for pattern in ["randwrite", "write", "randtrimwrite"] {
        let kind = format!("--rw={pattern}");
        let mut fio = fio.command();
        fio.current_dir(dir.path())
            .args(["--name=verify", "--ioengine=nbd", &uri, &kind])
            .args(["--bsrange=4k-128k", "--size=128m", "--io_size=64m"])
            .args(["--iodepth=32", "--verify=crc32c", "--verify_fatal=1"])
            .args(["--end_fsync=1", "--minimal"]);
        let ran = Ran::run(&mut fio)?;
        ensure!(ran.code == Some(0), "{pattern}: {ran}");
    }
    daemon.stop()
}

#[test]
fn flush_on_one_connection_covers_the_writes_of_another() -> Result<()> {
    let dir = tempdir()?;
    let daemon = started(dir.path(), 64 * MIB)?;
    let site = daemon.site().clone();
    let mut writers = (0..4)
        .map(|_| daemon.connect(VOLUME))
        .collect::<Result<Vec<_>>>()?;
    for (index, writer) in (0_u8..).zip(&mut writers) {
        let mut cookies = Vec::new();
        for block in 0..64 {
            let at = (u64::from(index) * 64 + block) * 4096;
            cookies.push(writer.send_write(at, &[index + 1; 4096], false)?);
        }
        for cookie in cookies {
            writer.wait(cookie)?;
        }
    }
    daemon.connect(VOLUME)?.flush()?;
    daemon.kill()?;
    let daemon = site.start()?;
    let mut reader = daemon.connect(VOLUME)?;
    for index in 0_u8..4 {
        let found = reader.read_vec(u64::from(index) * 64 * 4096, 64 * 4096)?;
        ensure!(
            found.iter().all(|byte| *byte == index + 1),
            "writer {index}"
        );
    }
    daemon.stop()
}

#[test]
fn image_written_to_s3_comes_back_after_losing_the_host() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = quarry_tests::SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let original = dir.path().join("original");
    image(&original, 48 * MIB)?;
    let original = fs::read(&original)?;
    let site = Site::with_s3(dir.path(), "a", &server, server.address(), "quarry")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 48 * MIB, &[])?;
    for (index, piece) in (0..).zip(original.chunks(1 << 20)) {
        nbd.write(index * MIB, piece, false)?;
    }
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    let found = daemon.attach(VOLUME, &["--force"])?.read_vec(0, 48 * MIB)?;
    quarry_tests::same_bytes("the volume from S3", &found, &original)?;
    daemon.stop()
}
