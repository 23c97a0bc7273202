//! The product itself: a Linux block device by ublk, in a kernel of our own (User Mode Linux), with a file system
//! on it, and the crashes of a daemon and of a whole host.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    GIB, MIB, Qemu, Ran, quarry_program, skip, target_dir, test_number, tool, vm_kernel,
};
use tempfile::{TempDir, tempdir_in};

/// How a script of the guest ends that cannot be run in its kernel.
const SKIPPED: i32 = 77;

/// All that a guest needs from the host.
struct Host {
    kernel: PathBuf,
    dir: TempDir,
    /// The guest's; the host gives only what is used.
    memory: &'static str,
    cpus: u32,
}

impl Host {
    fn new() -> Result<Option<Self>> {
        let Some(kernel) = vm_kernel() else {
            return Ok(None);
        };
        for program in ["busybox", "mkfs.ext4", "e2fsck", "taskset", "fio"] {
            if tool(program).is_none() {
                return Ok(None);
            }
        }
        // Not /tmp, which may be in memory.
        let dir = tempdir_in(target_dir())?;
        Ok(Some(Self {
            kernel,
            dir,
            memory: "1536M",
            cpus: 1,
        }))
    }

    /// The directory that outlives the guests.
    fn dir(&self) -> &str {
        self.dir.path().to_str().expect("a plain path")
    }

    /// Boots a guest that runs a script of `tests/vm` and ends.
    fn boot(&self, disks: &[&Path], script: &str, arguments: &[&str]) -> Result<()> {
        let ran = self.run(disks, script, arguments)?.ok()?;
        println!("{}{}", ran.stdout, ran.stderr);
        ensure!(!ran.stdout.contains("FAILED"), "{ran}");
        Ok(())
    }

    fn run(&self, disks: &[&Path], script: &str, arguments: &[&str]) -> Result<Ran> {
        let vm = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm");
        let mut command = Command::new(vm.join("run-in-uml"));
        command
            .env("QUARRY_VM_KERNEL", &self.kernel)
            .env("QUARRY_BIN", quarry_program())
            .args(["-t", "330", "-m", self.memory])
            .args(["-c", &self.cpus.to_string()]);
        for disk in disks {
            command.arg("-d").arg(disk);
        }
        command.arg(vm.join(script)).arg(self.dir()).args(arguments);
        Ran::run(&mut command)
    }

    /// A blank disk, of which the host gives only what is used.
    fn disk(&self, name: &str, size: u64) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        File::create(&path)?.set_len(size)?;
        Ok(path)
    }
}

#[test]
fn ublk_device_of_a_killed_daemon_comes_back_and_its_ext4_notices_nothing() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    let kills = test_number("QUARRY_TEST_CRASHES", 4).to_string();
    let replacements = test_number("QUARRY_TEST_REPLACEMENTS", 2).to_string();
    host.boot(&[], "guest-daemon-killed.sh", &[&kills, &replacements])
}

#[test]
fn devices_of_a_dead_daemon_are_taken_over_removed_or_left_alone() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    host.boot(&[], "guest-devices.sh", &[])
}

#[test]
fn device_of_an_encrypted_cache_goes_by_copies_and_leaves_no_plaintext() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    host.boot(&[], "guest-encrypted.sh", &[])
}

#[test]
fn device_has_its_name_owner_and_mode_when_it_is_attached_and_after_a_kill() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    host.boot(&[], "guest-node.sh", &["alone"])
}

#[test]
fn device_beside_udevd_keeps_its_owner_and_mode_with_the_rule_and_gets_them_without() -> Result<()>
{
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    if tool("udevadm").is_none() {
        return Ok(());
    }
    let ran = host.run(&[], "guest-node.sh", &["udev"])?;
    if ran.code == Some(SKIPPED) {
        let reason = ran.stdout.lines().find_map(|l| l.strip_prefix("SKIP "));
        skip(reason.context("a reason")?);
        return Ok(());
    }
    let ran = ran.ok()?;
    println!("{}{}", ran.stdout, ran.stderr);
    ensure!(ran.stdout.contains("guest: passed"), "{ran}");
    Ok(())
}

#[test]
fn device_of_two_queues_serves_both_and_outlives_its_daemon() -> Result<()> {
    let Some(mut host) = Host::new()? else {
        return Ok(());
    };
    host.cpus = 2;
    host.boot(&[], "guest-queues.sh", &[])
}

#[test]
fn device_with_a_limit_keeps_to_it_and_its_held_requests_outlive_their_daemon() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    host.boot(&[], "guest-limits.sh", &[])
}

#[test]
fn many_idle_devices_cost_no_thread_little_memory_and_outlive_their_daemon() -> Result<()> {
    let Some(mut host) = Host::new()? else {
        return Ok(());
    };
    host.memory = "5120M";
    // More than have entries of their own in the reactor's buffer table.
    let devices = test_number("QUARRY_TEST_DEVICES", 130).to_string();
    host.boot(&[], "guest-many.sh", &[&devices])
}

#[test]
fn device_grows_with_its_volume_under_ext4_and_over_the_death_of_a_daemon_between_the_two()
-> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    if tool("resize2fs").is_none() {
        return Ok(());
    }
    host.boot(&[], "guest-resize.sh", &[])
}

#[test]
fn image_is_exported_from_a_device_in_use_and_not_imported_into_one() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    host.boot(&[], "guest-images.sh", &[])
}

#[test]
fn machine_boots_from_its_volume_by_ublk_and_goes_on_over_a_kill_and_a_replacement() -> Result<()> {
    let (Some(host), Some(qemu)) = (Host::new()?, Qemu::find()) else {
        return Ok(());
    };
    if tool("qemu-nbd").is_none() || tool("debugfs").is_none() {
        return Ok(());
    }
    let options = Qemu::options("qemu-ublk", &[("-accel kvm -cpu host -m 2048", "-m 192")])?;
    let (program, image) = (qemu.program(), qemu.image());
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a plain path");
    let arguments = [vec![path(&program)?, path(&image)?], options].concat();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    host.boot(&[], "guest-qemu.sh", &arguments)
}

#[test]
fn devices_of_a_volume_and_its_snapshots_are_told_apart_in_use_and_after_kills() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    host.boot(&[], "guest-snapshots.sh", &[])
}

#[test]
fn host_after_power_cuts_has_every_synced_file_and_its_store_a_clean_ext4() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    let disk = host.disk("cache.img", 256 * MIB)?;
    let script = "guest-power-cut.sh";
    host.boot(&[&disk], script, &["first", "3"])
        .context("the first life")?;
    host.boot(&[&disk], script, &["again", "2.5"])
        .context("after a power cut")?;
    host.boot(&[&disk], script, &["again", "2"])
        .context("after two power cuts")?;
    let fresh = host.disk("another-cache.img", 256 * MIB)?;
    std::fs::remove_dir_all(host.dir.path().join("state"))?;
    host.boot(&[&fresh], script, &["elsewhere", "0"])
        .context("on another host")
}

/// A disk is replayed to its flushes, with `fs` on a volume of it.
fn replay_flushes(fs: &str, boundaries: u64, tools: &[&str]) -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    if tools.iter().any(|name| tool(name).is_none()) {
        return Ok(());
    }
    let boundaries = test_number("QUARRY_TEST_BOUNDARIES", boundaries).to_string();
    let disk = host.disk("disk.img", 256 * MIB)?;
    let log = host.disk("log.img", 2 * GIB)?;
    let log_writes = env!("CARGO_BIN_EXE_log-writes");
    let arguments = [log_writes, fs, &boundaries, "3"];
    host.boot(&[&disk, &log], "guest-boundaries.sh", &arguments)
}

#[test]
fn disk_as_it_was_at_each_flush_has_every_synced_file_of_an_ext4_volume() -> Result<()> {
    replay_flushes("ext4", 14, &["dmsetup", "losetup"])
}

#[test]
fn disk_as_it_was_at_each_flush_has_every_synced_file_of_an_xfs_volume() -> Result<()> {
    let tools = ["dmsetup", "losetup", "mkfs.xfs", "xfs_repair"];
    replay_flushes("xfs", 10, &tools)
}

#[test]
fn cache_device_that_fails_fails_flushes_loses_nothing_flushed_and_shows_nothing_wrong()
-> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    if tool("dmsetup").is_none() {
        return Ok(());
    }
    let disk = host.disk("cache.img", 128 * MIB)?;
    host.boot(&[&disk], "guest-bad-disk.sh", &[])
}

#[test]
fn sectors_read_beside_a_write_of_their_page_leave_nothing_old_in_the_page_cache() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    let tools = ["dmsetup", "qemu-io", "mkfs.ext4"];
    if tools.iter().any(|name| tool(name).is_none()) {
        return Ok(());
    }
    let disk = host.disk("cache.img", 256 * MIB)?;
    host.boot(&[&disk], "guest-pages.sh", &[])
}

#[test]
fn attach_without_room_for_list_journal_or_device_is_undone_and_others_go_on() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    host.boot(&[], "guest-full.sh", &[])
}

#[test]
fn databases_and_a_repository_keep_what_was_committed_over_kills_and_a_power_cut() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    // Debian keeps most of PostgreSQL's programs out of the PATH; one that is in it stands for them.
    let tools = [
        "mkfs.xfs",
        "xfs_repair",
        "pgbench",
        "sqlite3",
        "git",
        "setpriv",
    ];
    if tools.iter().any(|name| tool(name).is_none()) {
        return Ok(());
    }
    let disk = host.disk("cache.img", 256 * MIB)?;
    let script = "guest-users.sh";
    host.boot(&[&disk], script, &["first", "4"])
        .context("the first life")?;
    host.boot(&[&disk], script, &["last"])
        .context("after a power cut")
}

#[test]
fn clock_memory_second_daemons_and_another_host_cost_a_volume_nothing() -> Result<()> {
    let Some(mut host) = Host::new()? else {
        return Ok(());
    };
    // Little, for it is to end.
    host.memory = "512M";
    let disk = host.disk("cache.img", 128 * MIB)?;
    host.boot(&[&disk], "guest-mishaps.sh", &[])
}

#[test]
fn direct_reads_of_a_real_s3_server_copy_nothing_and_survive_what_happens_to_it() -> Result<()> {
    let (Some(mut host), Some(weed)) = (Host::new()?, tool("weed")) else {
        return Ok(());
    };
    host.memory = "2500M";
    let weed = weed.path().to_str().context("a plain path")?;
    let proxy = env!("CARGO_BIN_EXE_moody-proxy");
    host.boot(&[], "guest-direct.sh", &[weed, proxy])
}

#[test]
fn kubernetes_volumes_are_made_used_cloned_grown_and_outlive_their_node() -> Result<()> {
    let Some(host) = Host::new()? else {
        return Ok(());
    };
    for program in ["mkfs.xfs", "xfs_growfs", "resize2fs", "blkid"] {
        if tool(program).is_none() {
            return Ok(());
        }
    }
    let scenario = env!("CARGO_BIN_EXE_csi-scenario");
    host.boot(&[], "guest-csi.sh", &[scenario])
}
