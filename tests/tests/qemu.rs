//! Machines in QEMU whose disk is a volume, by the command lines of docs/QEMU.md: they boot from it, by BIOS and GRUB. The one
//! by ublk is in `tests/vm/guest-qemu.sh`.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, Machine, Qemu, Ran, Site, certificates, free_port, tool};
use tempfile::{TempDir, tempdir};

const VOLUME: &str = "acme/vm1";

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is plain")
}

/// A volume for a machine, as the page has it: a clone of an image's snapshot.
fn machines_volume(daemon: &Daemon, qemu: &Qemu) -> Result<()> {
    daemon.quarry(&["tenant", "create", "acme"])?;
    daemon.quarry(&["volume", "import", text(&qemu.image()), "acme/debian"])?;
    daemon.quarry(&["snapshot", "create", "acme/debian@golden"])?;
    daemon.quarry(&["volume", "clone", "acme/debian@golden", VOLUME])?;
    daemon.quarry(&["volume", "attach", VOLUME, "--via", "nbd"])
}

/// Writes a file in the guest that is on its disk afterwards; its MD5 sum.
fn mark(machine: &mut Machine, name: &str) -> Result<String> {
    let path = format!("/data/{name}");
    let said = machine.run(&format!(
        "busybox dd if=/dev/urandom of={path} bs=4096 count=64 2>/dev/null && busybox sync && busybox md5sum {path}"
    ))?;
    let sum = said
        .split_whitespace()
        .next()
        .context("md5sum prints a sum")?;
    ensure!(sum.len() == 32, "{said}");
    Ok(sum.to_owned())
}

/// The volume's file system is clean and has these files.
fn check(daemon: &Daemon, dir: &TempDir, marks: &[(&str, String)]) -> Result<()> {
    let (Some(e2fsck), Some(debugfs), Some(md5sum)) =
        (tool("e2fsck"), tool("debugfs"), tool("md5sum"))
    else {
        return Ok(());
    };
    let disk = dir.path().join("disk.raw");
    daemon.quarry(&["volume", "export", VOLUME, text(&disk)])?;
    let partition = dir.path().join("partition");
    let bytes = fs::read(&disk)?;
    fs::write(
        &partition,
        bytes.get(1 << 20..).context("a partition at 1 MiB")?,
    )?;
    Ran::run(e2fsck.command().args(["-f", "-n"]).arg(&partition))?.ok()?;
    for (name, sum) in marks {
        let out = dir.path().join("out");
        let dump = format!("dump /data/{name} {}", text(&out));
        Ran::run(debugfs.command().args(["-R", &dump]).arg(&partition))?.ok()?;
        let found = Ran::run(md5sum.command().arg(&out))?.ok()?.stdout;
        ensure!(found.starts_with(sum), "{name} is {found}, not {sum}");
    }
    Ok(())
}

#[test]
fn machine_boots_from_its_volume_by_nbd_and_goes_on_over_a_killed_daemon() -> Result<()> {
    let (Some(qemu), Some(_)) = (Qemu::find(), tool("qemu-nbd")) else {
        return Ok(());
    };
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    machines_volume(&daemon, &qemu)?;
    let (uri, memory) = (
        daemon.uri(VOLUME)?,
        ("-accel kvm -cpu host -m 2048", "-m 256"),
    );
    let (_, socket) = uri.split_once("socket=").context("a unix socket")?;
    let place = ("/run/quarry/quarry-nbd.sock", socket);
    let options = Qemu::options("qemu-nbd", &[place, memory])?;
    let mut machine = qemu.boot(&options, &dir.path().join("monitor"))?;
    ensure!(
        machine.root().starts_with("/dev/vda1 / ext4 rw"),
        "{}",
        machine.root()
    );
    ensure!(machine.run("echo $(busybox cat /sys/block/vda/serial)")? == "acme-vm1");
    let before = mark(&mut machine, "before")?;

    // Discards reach the volume.
    daemon.sync(VOLUME)?;
    let discards = || daemon.count("quarry_volume_discards_total", "");
    let none = discards()?;
    machine.run("busybox fstrim /")?;
    ensure!(discards()? > none, "no discard came");

    // The daemon dies while the guest writes, and is back a moment later.
    machine.send(
        "i=0; while [ $i -lt 100 ]; do echo $i >/data/f$i && busybox sync || break; i=$((i+1)); done",
    )?;
    let ended = machine.ends_within(Duration::from_millis(200))?;
    ensure!(!ended, "the guest was done before the daemon was killed");
    daemon.kill()?;
    thread::sleep(Duration::from_millis(500));
    let daemon = site.start()?;
    machine.done().context("the guest's writes")?;
    ensure!(machine.run("busybox cat /data/f99")? == "99");
    let after = mark(&mut machine, "after")?;

    // A write that fails stops the machine, and the guest is told nothing.
    daemon.quarry(&["tenant", "suspend", "acme"])?;
    machine.send("echo held >/data/held && busybox sync")?;
    machine.await_status("paused (io-error)")?;
    ensure!(!machine.ends_within(Duration::from_millis(200))?);
    daemon.quarry(&["tenant", "resume", "acme"])?;
    machine.monitor("cont")?;
    machine.done().context("the write that was held")?;
    let last = mark(&mut machine, "last")?;
    machine.power_off()?;

    // The host is lost, once everything was sent.
    let marks = [("before", before), ("after", after), ("last", last)];
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    drop(daemon.attach(VOLUME, &["--force"])?);
    check(&daemon, &dir, &marks)?;
    // What it was cloned from is as it was imported.
    let image = dir.path().join("image.raw");
    daemon.quarry(&["volume", "export", "acme/debian@golden", text(&image)])?;
    ensure!(
        fs::read(&image)? == fs::read(qemu.image())?,
        "the image is another"
    );
    daemon.stop()
}

#[test]
fn machine_boots_by_nbd_over_tls_and_stops_where_it_may_not_wait_for_the_daemon() -> Result<()> {
    let (Some(qemu), Some(_)) = (Qemu::find(), tool("qemu-nbd")) else {
        return Ok(());
    };
    let dir = tempdir()?;
    if !certificates(dir.path(), VOLUME)? {
        return Ok(());
    }
    let port = free_port();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let settings = format!(
        "[daemon]\nnbd_listen = \"127.0.0.1:{port}\"\n\
         [access]\ntls_cert = \"{}\"\ntls_key = \"{}\"\nnbd_client_ca = \"{}\"\n",
        at("server.pem"),
        at("server.key"),
        at("ca.pem"),
    );
    let site = Site::with_folder(dir.path(), "a")?.settings(&settings);
    let daemon = site.start()?;
    machines_volume(&daemon, &qemu)?;
    let changes = [
        ("storage1", "localhost"),
        ("server.port=10809", &format!("server.port={port}")),
        ("/etc/quarry/vm1", &at("client")),
        ("-accel kvm -cpu host -m 2048", "-m 256"),
        // As where libvirt cannot say it.
        ("reconnect-delay=300,", ""),
    ];
    let options = Qemu::options("qemu-tls", &changes)?;
    let mut machine = qemu.boot(&options, &dir.path().join("monitor"))?;
    daemon.kill()?;
    machine.send("echo held >/data/held && busybox sync")?;
    machine.await_status("paused (io-error)")?;
    let daemon = site.start()?;
    // The first time QEMU only begins to connect.
    let mut tries = 0;
    while !machine.ends_within(Duration::from_millis(500))? {
        ensure!(tries < 60, "the write is never done");
        machine.monitor("cont")?;
        tries += 1;
    }
    let sum = mark(&mut machine, "mark")?;
    machine.power_off()?;
    check(&daemon, &dir, &[("mark", sum)])?;
    daemon.stop()
}
