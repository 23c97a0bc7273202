//! What the daemon finds out of a store before it keeps anything in it, and a store that is away at
//! the start.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use quarry_tests::{FaultProxy, MIB, Nanio, SeaweedFs, Site};
use tempfile::tempdir;

#[test]
fn store_that_ignores_conditions_is_refused_before_anything_is_kept() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = Nanio::start(dir.path())? else {
        return Ok(());
    };
    let environment = server.client_environment();
    let site = Site::with_environment(dir.path(), "a", "quarry", environment)?;
    let refused = site.serve_refused()?;
    ensure!(refused.stderr.contains("If-None-Match"), "{refused}");
    ensure!(refused.stderr.contains("destroy"), "no reason: {refused}");
    ensure!(!refused.stderr.contains("panicked"), "{refused}");
    Ok(())
}

#[test]
fn bucket_that_is_missing_is_made_or_refused_by_name() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let at = server.address();
    let careful = Site::with_s3(dir.path(), "a", &server, at, "quarry-mispelt")?
        .settings("[store]\nmake_missing = false\n");
    let refused = careful.serve_refused()?;
    ensure!(refused.stderr.contains("quarry-mispelt"), "{refused}");
    let daemon = Site::with_s3(dir.path(), "b", &server, at, "quarry-mispelt")?.start()?;
    drop(daemon.fresh_volume("acme/db", 64 * MIB, &[])?);
    daemon.stop()?;
    careful.start()?.stop()
}

#[test]
fn daemon_whose_store_does_not_answer_and_is_not_the_one_noted_replaces_none() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let at = server.address();
    let mut daemon = Site::with_s3(dir.path(), "a", &server, at, "quarry")?.start()?;
    let nowhere = FaultProxy::start(at)?;
    nowhere.cut();
    let lost = Site::with_s3(dir.path(), "a", &server, nowhere.address(), "quarry")?;
    let refused = lost.replace_refused()?;
    ensure!(refused.stderr.contains("which goes on"), "{refused}");
    daemon.assert_alive()?;
    drop(daemon.fresh_volume("acme/db", 64 * MIB, &[])?);
    daemon.stop()
}

#[test]
fn store_away_at_the_start_is_waited_for_and_volumes_come_back_by_themselves() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    daemon.stop()?;

    proxy.cut();
    let starting = {
        let site = site.clone();
        thread::spawn(move || site.start())
    };
    // Long enough for the first try to fail; and the daemon answers meanwhile.
    thread::sleep(Duration::from_secs(8));
    ensure!(!starting.is_finished(), "ready without a store");
    let status = site.quarry(&["status"])?;
    ensure!(status.code != Some(0), "{status}");
    let said = format!("{}{}", status.stdout, status.stderr);
    ensure!(said.contains("not found fit yet"), "no reason: {said}");
    proxy.heal();
    let daemon = starting.join().expect("starting does not panic")?;
    ensure!(daemon.connect("acme/db")?.read_vec(0, 4096)? == [1; 4096]);
    daemon.stop()
}
