//! Disk images in and out: `quarry volume import` and `quarry volume export`.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use quarry_tests::{Daemon, MIB, Ran, Refusal, Site, TIB, test_number, tool};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::tempdir;

const VOLUME: &str = "acme/image";

/// Longest wait for what should come within seconds.
const PATIENCE: Duration = Duration::from_secs(120);

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is plain")
}

/// A raw image of `size` bytes: of each 8 MiB the first `data` bytes are random, then come zeroes that take
/// space, then holes.
fn raw_image(path: &Path, size: u64, data: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let file = File::create(path)?;
    file.set_len(size)?;
    let mut buf = vec![0; usize::try_from(data)?];
    for start in (0..size).step_by(8 << 20) {
        random.read_exact(&mut buf)?;
        let there = usize::try_from(data.min(size - start))?;
        file.write_all_at(&buf[..there], start)?;
        if start + data + MIB <= size && data + MIB <= 8 * MIB {
            file.write_all_at(&vec![0; 1 << 20], start + data)?;
        }
    }
    Ok(())
}

fn qemu_img(arguments: &[&str]) -> Result<Option<Ran>> {
    let Some(qemu_img) = tool("qemu-img") else {
        return Ok(None);
    };
    Ran::run(qemu_img.command().args(arguments))?.ok().map(Some)
}

/// A qcow2 image of a raw one; false if there is no qemu-img.
fn to_qcow2(raw: &Path, qcow2: &Path) -> Result<bool> {
    let arguments = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(raw),
        text(qcow2),
    ];
    Ok(qemu_img(&arguments)?.is_some())
}

/// Whether two raw images are the same, in constant memory.
fn same_files(one: &Path, other: &Path) -> Result<()> {
    let cmp = tool("cmp").context("cmp is everywhere")?;
    Ran::run(cmp.command().args([one, other]))?.ok().map(drop)
}

fn started(dir: &Path, name: &str) -> Result<Daemon> {
    let daemon = Site::with_folder(dir, name)?.cache_size("128MiB").start()?;
    daemon.site().quarry(&["tenant", "create", "acme"])?;
    Ok(daemon)
}

fn import(daemon: &Daemon, image: &Path, flags: &[&str]) -> Result<Value> {
    let call = ["volume", "import", text(image), VOLUME];
    daemon.json(&[&call, flags].concat())
}

fn import_refused(daemon: &Daemon, image: &Path, flags: &[&str]) -> Result<Refusal> {
    let call = ["volume", "import", text(image), VOLUME];
    let ran = daemon.site().quarry_json(&[&call, flags].concat())?;
    ran.refusal()
}

fn export(daemon: &Daemon, image: &Path, flags: &[&str]) -> Result<Value> {
    let call = ["volume", "export", VOLUME, text(image)];
    daemon.json(&[&call, flags].concat())
}

fn number(answer: &Value, key: &str) -> Result<u64> {
    answer[key]
        .as_u64()
        .with_context(|| format!("no {key} in {answer}"))
}

/// An import that runs beside the test.
struct Running {
    child: Child,
    state: PathBuf,
}

impl Running {
    /// With one request at a time, so that it takes its time.
    fn start(site: &Site, image: &Path) -> Result<Self> {
        let flags = ["--jobs", "1", "--output", "json"];
        let call = ["volume", "import", text(image), VOLUME];
        let mut command = site.command(&[&call[..], &flags].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Self {
            child: command.spawn()?,
            state: site.state(),
        })
    }

    /// What its record says is in the store; 0 if there is none.
    fn sent(&self) -> Result<u64> {
        let Ok(files) = fs::read_dir(self.state.join("quarry")) else {
            return Ok(0);
        };
        for file in files {
            let path = file?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                let record: Value = serde_json::from_slice(&fs::read(path)?)?;
                return number(&record, "sent_bytes");
            }
        }
        Ok(0)
    }

    /// Waits until its record names `bytes` at least, and gives how many.
    fn wait_for(&mut self, bytes: u64) -> Result<u64> {
        let begun = Instant::now();
        loop {
            let sent = self.sent()?;
            if sent >= bytes {
                return Ok(sent);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the import ended with {status} before it was cut off");
            }
            ensure!(begun.elapsed() < PATIENCE, "{sent} bytes are recorded");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(self) -> Result<Ran> {
        let output = self.child.wait_with_output()?;
        Ok(Ran {
            line: "the import".to_owned(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout)?,
            stderr: String::from_utf8(output.stderr)?,
        })
    }
}

fn cut_off_bytes() -> u64 {
    test_number("QUARRY_TEST_IMAGE_MIB", 384) * MIB
}

#[test]
fn qcow2_imported_and_exported_on_another_host_compares_equal() -> Result<()> {
    let dir = tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let (raw, qcow2) = (path("disk.raw"), path("disk.qcow2"));
    raw_image(&raw, 100 * MIB + 512, 3 * MIB + 1536)?;
    if !to_qcow2(&raw, &qcow2)? {
        return Ok(());
    }
    let daemon = started(dir.path(), "a")?;
    let done = import(&daemon, &qcow2, &[])?;
    ensure!(done["format"] == "qcow2" && number(&done, "image_bytes")? == 100 * MIB + 512);
    // What is zeroes was not written.
    ensure!(number(&done, "written_bytes")? < 45 * MIB, "{done}");
    ensure!(daemon.show(VOLUME)?["state"] == "detached");
    daemon.stop()?;

    // All of it is in the store.
    let daemon = started(dir.path(), "b")?;
    for format in ["qcow2", "raw", "vmdk", "vhdx"] {
        let back = path(&format!("back.{format}"));
        let done = export(&daemon, &back, &[])?;
        ensure!(done["format"] == format, "{done}");
        ensure!(number(&done, "written_bytes")? < 45 * MIB, "{done}");
        let compare = [
            "compare",
            "-f",
            format,
            "-F",
            "qcow2",
            text(&back),
            text(&qcow2),
        ];
        qemu_img(&compare)?;
    }
    same_files(&path("back.raw"), &raw)?;
    ensure!(fs::metadata(path("back.raw"))?.blocks() * 512 < 50 * MIB);
    ensure!(daemon.show(VOLUME)?["state"] == "detached");
    let left = |entry: io::Result<fs::DirEntry>| {
        Ok(entry?.file_name().to_string_lossy().ends_with(".part"))
    };
    let left: io::Result<Vec<bool>> = fs::read_dir(dir.path())?.map(left).collect();
    ensure!(!left?.contains(&true), "an export left its part behind");
    daemon.stop()
}

#[test]
fn import_killed_goes_on_where_its_record_is() -> Result<()> {
    let dir = tempdir()?;
    let (raw, qcow2) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    let size = cut_off_bytes();
    raw_image(&raw, size, 7 * MIB)?;
    let image = if to_qcow2(&raw, &qcow2)? {
        &qcow2
    } else {
        &raw
    };
    let daemon = started(dir.path(), "a")?;
    let mut running = Running::start(daemon.site(), image)?;
    running.wait_for(size / 8)?;
    running.child.kill()?;
    running.child.wait()?;
    let sent = running.sent()?;
    let before = daemon.show(VOLUME)?;
    ensure!(before["state"] == "attached", "{before}");

    // Another image is not taken for this one, nor is what somebody wrote meanwhile.
    let changed = File::options().write(true).open(image)?;
    let modified = changed.metadata()?.modified()?;
    changed.set_modified(modified + Duration::from_secs(1))?;
    let refusal = import_refused(&daemon, image, &[])?;
    ensure!(
        refusal.kind == "conflict" && refusal.mentions("was changed"),
        "{refusal:?}"
    );
    changed.set_modified(modified)?;
    let mut nbd = daemon.connect(VOLUME)?;
    let first = nbd.read_vec(0, 4096)?;
    nbd.write(0, &[0x11; 4096], false)?;
    let refusal = import_refused(&daemon, image, &[])?;
    ensure!(
        refusal.kind == "conflict" && refusal.mentions("byte 0"),
        "{refusal:?}"
    );
    nbd.write(0, &first, false)?;
    drop(nbd);

    let before = number(&daemon.show(VOLUME)?, "write_bytes")?;
    let done = import(&daemon, image, &["--attach"])?;
    ensure!(
        number(&done, "resumed_bytes")? == sent,
        "{done}, recorded {sent}"
    );
    let written = number(&done, "written_bytes")?;
    ensure!(
        written <= size - sent,
        "{done}: what was sent is not written again"
    );
    // The daemon's own count says the same.
    let counted = number(&daemon.show(VOLUME)?, "write_bytes")? - before;
    ensure!(
        counted == written,
        "{counted} bytes were written, not {written}"
    );
    let back = dir.path().join("back.raw");
    export(&daemon, &back, &[])?;
    same_files(&back, &raw)?;
    // It is finished: the next one is another.
    let refusal = import_refused(&daemon, image, &[])?;
    ensure!(refusal.mentions("not empty"), "{refusal:?}");
    daemon.stop()
}

/// An import whose daemon is killed, and whose host may be lost too, goes on at the next one.
fn daemon_killed(host_lost: bool) -> Result<()> {
    let dir = tempdir()?;
    let raw = dir.path().join("disk.raw");
    let size = cut_off_bytes();
    raw_image(&raw, size, 7 * MIB)?;
    let daemon = started(dir.path(), "a")?;
    let site = daemon.site().clone();
    let mut running = Running::start(&site, &raw)?;
    running.wait_for(size / 8)?;
    daemon.kill()?;
    let refusal = running.end()?.refusal()?;
    ensure!(refusal.kind == "unavailable", "{refusal:?}");
    ensure!(refusal.mentions("goes on where"), "{refusal:?}");
    if host_lost {
        site.lose_host()?;
    }
    let daemon = site.start()?;
    if host_lost {
        drop(daemon.attach(VOLUME, &["--force"])?);
    }
    let done = import(&daemon, &raw, &[])?;
    let resumed = number(&done, "resumed_bytes")?;
    ensure!(resumed >= size / 8, "{done}");
    ensure!(number(&done, "written_bytes")? <= size - resumed, "{done}");
    let back = dir.path().join("back.raw");
    export(&daemon, &back, &[])?;
    same_files(&back, &raw)?;
    daemon.stop()
}

#[test]
fn import_whose_daemon_is_killed_goes_on_at_the_next_one() -> Result<()> {
    daemon_killed(false)
}

#[test]
fn import_whose_host_is_lost_goes_on_with_what_the_store_has() -> Result<()> {
    daemon_killed(true)
}

/// Runs `command` with the file as its standard input.
fn fed(mut command: Command, image: &Path) -> Result<Ran> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut pipe = child.stdin.take().context("a pipe")?;
    let bytes = fs::read(image)?;
    // One that has had enough does not read on.
    let writer = thread::spawn(move || pipe.write_all(&bytes));
    let output = child.wait_with_output()?;
    drop(writer.join().expect("no panic"));
    Ok(Ran {
        line: format!("{command:?}"),
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

#[test]
fn standard_input_and_output_are_raw_images() -> Result<()> {
    let dir = tempdir()?;
    let raw = dir.path().join("disk.raw");
    let size = 40 * MIB + 100;
    raw_image(&raw, size, MIB + 100)?;
    let daemon = started(dir.path(), "a")?;
    let call = |flags: &[&str]| {
        let call = ["volume", "import", "-", VOLUME, "--output", "json"];
        daemon.site().command(&[&call, flags].concat())
    };
    let refusal = fed(call(&[]), &raw)?.refusal()?;
    ensure!(refusal.mentions("--size"), "{refusal:?}");
    let refusal = fed(call(&["--size", "32MiB"]), &raw)?.refusal()?;
    ensure!(refusal.mentions("more to read than"), "{refusal:?}");
    daemon.quarry(&["volume", "delete", VOLUME])?;
    let done = fed(call(&["--size", "48MiB"]), &raw)?.json()?;
    ensure!(number(&done, "written_bytes")? < 20 * MIB, "{done}");
    let refusal = fed(call(&[]), &raw)?.refusal()?;
    ensure!(refusal.mentions("not empty"), "{refusal:?}");

    let back = dir.path().join("back.raw");
    let mut export = daemon.site().command(&["volume", "export", VOLUME, "-"]);
    let status = export.stdout(File::create(&back)?).status()?;
    ensure!(status.success());
    File::options().write(true).open(&raw)?.set_len(48 * MIB)?;
    same_files(&back, &raw)?;
    let full = File::options().write(true).open("/dev/full")?;
    let mut export = daemon.site().command(&["volume", "export", VOLUME, "-"]);
    let ended = export.stdout(full).output()?;
    let words = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.code() == Some(1), "{words}");
    ensure!(words.contains("standard output"), "{words}");
    ensure!(!words.contains("NBD") && !words.contains("log"), "{words}");
    daemon.stop()
}

#[test]
fn import_over_data_is_refused_and_with_overwrite_leaves_none_of_them() -> Result<()> {
    let dir = tempdir()?;
    let (raw, back) = (dir.path().join("disk.raw"), dir.path().join("back.raw"));
    raw_image(&raw, 20 * MIB, MIB)?;
    let daemon = started(dir.path(), "a")?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(5 * MIB, &[7; 1 << 20], false)?;
    nbd.write(60 * MIB, &[7; 4096], false)?;
    let refusal = import_refused(&daemon, &raw, &[])?;
    ensure!(
        refusal.kind == "conflict" && refusal.mentions("--overwrite"),
        "{refusal:?}"
    );
    ensure!(nbd.read_vec(5 * MIB, 4096)? == [7; 4096]);
    import(&daemon, &raw, &["--overwrite"])?;
    ensure!(daemon.show(VOLUME)?["state"] == "attached", "as it was");
    export(&daemon, &back, &[])?;
    File::options().write(true).open(&raw)?.set_len(64 * MIB)?;
    same_files(&back, &raw)?;
    daemon.stop()
}

#[test]
fn image_that_does_not_fit_or_cannot_be_read_is_refused_with_a_reason() -> Result<()> {
    let dir = tempdir()?;
    let path = |name: &str| dir.path().join(name);
    raw_image(&path("disk.raw"), 20 * MIB, MIB)?;
    let daemon = started(dir.path(), "a")?;
    daemon.create(VOLUME, 16 * MIB, &[])?;
    let refusal = import_refused(&daemon, &path("disk.raw"), &[])?;
    ensure!(
        refusal.kind == "invalid" && refusal.mentions("resize"),
        "{refusal:?}"
    );
    let refusal = import_refused(&daemon, &path("none.raw"), &[])?;
    ensure!(refusal.mentions("none.raw"), "{refusal:?}");
    if !to_qcow2(&path("disk.raw"), &path("disk.qcow2"))? {
        return daemon.stop();
    }
    daemon.quarry(&["volume", "delete", VOLUME])?;

    // Without QEMU's programs: which are missing, and where they are had.
    let qcow2 = path("disk.qcow2");
    let call = ["volume", "import", text(&qcow2), VOLUME];
    let mut without = daemon.site().command(&call);
    without.args(["--output", "json"]).env("PATH", dir.path());
    let refusal = Ran::run(&mut without)?.refusal()?;
    ensure!(refusal.mentions("qemu-utils"), "{refusal:?}");

    // What a broken download leaves: QEMU itself reads zeroes there.
    let whole = fs::read(&qcow2)?;
    for len in [104, whole.len() / 2] {
        fs::write(path("cut.qcow2"), &whole[..len])?;
        let refusal = import_refused(&daemon, &path("cut.qcow2"), &[])?;
        ensure!(refusal.kind == "damaged", "{refusal:?}");
    }
    ensure!(daemon.show(VOLUME).is_err(), "no volume is made for it");
    // Damage in compressed data: found when they are read.
    let mut plain = Vec::new();
    for n in 0..2_000_000_u32 {
        plain.extend_from_slice(format!("{n:08x} line\n").as_bytes());
    }
    plain.truncate(16 << 20);
    fs::write(path("plain.raw"), &plain)?;
    let damaged = path("damaged.qcow2");
    let raw = path("plain.raw");
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
    qemu_img(&[&convert[..], &[text(&raw), text(&damaged)]].concat())?;
    let middle = fs::metadata(&damaged)?.len() / 2;
    let file = File::options().write(true).open(&damaged)?;
    file.write_all_at(&[0xff; 8192], middle)?;
    let refusal = import_refused(&daemon, &damaged, &[])?;
    ensure!(refusal.mentions("cannot be read at byte"), "{refusal:?}");
    ensure!(daemon.show(VOLUME)?["state"] == "detached");

    // An image that would have us read another file.
    let secret = path("secret");
    fs::write(&secret, vec![0x53; 1 << 20])?;
    let make = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    qemu_img(&[&make[..], &[text(&secret), text(&path("thief.qcow2"))]].concat())?;
    let refusal = import_refused(&daemon, &path("thief.qcow2"), &["--overwrite"])?;
    ensure!(refusal.mentions("refers to another file"), "{refusal:?}");
    daemon.stop()
}

#[test]
fn export_replaces_no_file_unasked_and_takes_up_what_a_killed_one_left() -> Result<()> {
    let dir = tempdir()?;
    let (raw, back) = (dir.path().join("disk.raw"), dir.path().join("back.raw"));
    raw_image(&raw, 20 * MIB, MIB)?;
    let daemon = started(dir.path(), "a")?;
    import(&daemon, &raw, &[])?;
    fs::write(&back, "mine")?;
    let call = ["volume", "export", VOLUME, text(&back)];
    let refusal = daemon.site().quarry_json(&call)?.refusal()?;
    ensure!(
        refusal.kind == "conflict" && refusal.mentions("--force"),
        "{refusal:?}"
    );
    ensure!(fs::read(&back)? == b"mine");
    fs::write(dir.path().join(".back.raw.part"), vec![9; 30 << 20])?;
    export(&daemon, &back, &["--force"])?;
    same_files(&back, &raw)?;
    ensure!(!dir.path().join(".back.raw.part").exists());
    let call = ["volume", "export", VOLUME, "/dev/null", "--force"];
    let refusal = daemon.site().quarry_json(&call)?.refusal()?;
    ensure!(refusal.mentions("no file"), "{refusal:?}");
    daemon.stop()
}

#[test]
fn import_and_export_interrupted_say_so_and_leave_what_goes_on() -> Result<()> {
    let dir = tempdir()?;
    let (raw, back) = (dir.path().join("disk.raw"), dir.path().join("back.qcow2"));
    raw_image(&raw, cut_off_bytes(), 7 * MIB)?;
    let daemon = started(dir.path(), "a")?;
    let mut running = Running::start(daemon.site(), &raw)?;
    let sent = running.wait_for(MIB)?;
    kill_process(Pid::from_child(&running.child), Signal::INT)?;
    let refusal = running.end()?.refusal()?;
    ensure!(
        refusal.kind == "interrupted" && refusal.mentions("stays attached"),
        "{refusal:?}"
    );
    let done = import(&daemon, &raw, &[])?;
    ensure!(number(&done, "resumed_bytes")? >= sent, "{done}");
    // As the first one found it.
    ensure!(daemon.show(VOLUME)?["state"] == "detached");

    if tool("qemu-nbd").is_none() {
        return daemon.stop();
    }
    let call = [
        "volume",
        "export",
        VOLUME,
        text(&back),
        "--jobs",
        "1",
        "--output",
        "json",
    ];
    let mut command = daemon.site().command(&call);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn()?;
    let part = dir.path().join(".back.qcow2.part");
    let begun = Instant::now();
    while !fs::metadata(&part).is_ok_and(|part| part.blocks() * 512 > 4 * MIB) {
        ensure!(begun.elapsed() < PATIENCE, "nothing is exported");
        thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    let state = daemon.site().state();
    let refusal = Running { child, state }.end()?.refusal()?;
    ensure!(refusal.kind == "interrupted", "{refusal:?}");
    ensure!(!part.exists() && !back.exists());
    ensure!(daemon.show(VOLUME)?["state"] == "detached");
    daemon.stop()
}

#[test]
fn image_changed_during_its_import_is_told_of() -> Result<()> {
    let dir = tempdir()?;
    let raw = dir.path().join("disk.raw");
    raw_image(&raw, cut_off_bytes(), 7 * MIB)?;
    let daemon = started(dir.path(), "a")?;
    let mut running = Running::start(daemon.site(), &raw)?;
    running.wait_for(MIB)?;
    let file = File::options().write(true).open(&raw)?;
    file.write_all_at(&[0; 512], 0)?;
    let refusal = running.end()?.refusal()?;
    ensure!(
        refusal.mentions("was changed while it was imported"),
        "{refusal:?}"
    );
    let refusal = import_refused(&daemon, &raw, &[])?;
    ensure!(refusal.mentions("--overwrite"), "{refusal:?}");
    import(&daemon, &raw, &["--overwrite"])?;
    let back = dir.path().join("back.raw");
    export(&daemon, &back, &[])?;
    same_files(&back, &raw)?;
    daemon.stop()
}

#[test]
fn sparse_image_of_a_tebibyte_is_imported_and_exported_in_seconds() -> Result<()> {
    let dir = tempdir()?;
    let (raw, back) = (dir.path().join("disk.raw"), dir.path().join("back.raw"));
    let file = File::create(&raw)?;
    file.set_len(TIB)?;
    for n in 0_u8..10 {
        let at = u64::from(n) * (TIB / 10) / 4096 * 4096;
        file.write_all_at(&vec![n + 1; 1 << 20], at)?;
    }
    file.write_all_at(&[0xff; 4096], TIB - 4096)?;
    let daemon = started(dir.path(), "a")?;
    let begun = Instant::now();
    let done = import(&daemon, &raw, &["--sector-size", "4096"])?;
    ensure!(number(&done, "size_bytes")? == TIB);
    ensure!(number(&done, "written_bytes")? < 12 * MIB, "{done}");
    export(&daemon, &back, &[])?;
    println!("in and out in {:?}", begun.elapsed());
    ensure!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
    ensure!(fs::metadata(&back)?.blocks() * 512 < 20 * MIB);
    let back = File::open(&back)?;
    ensure!(back.metadata()?.len() == TIB);
    for n in 0_u8..10 {
        let at = u64::from(n) * (TIB / 10) / 4096 * 4096;
        let mut found = vec![0; 1 << 20];
        back.read_exact_at(&mut found, at)?;
        ensure!(found.iter().all(|byte| *byte == n + 1), "{n}");
    }
    let mut last = [0; 4096];
    back.read_exact_at(&mut last, TIB - 4096)?;
    ensure!(last == [0xff; 4096]);
    daemon.stop()
}
