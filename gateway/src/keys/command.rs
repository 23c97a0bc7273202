//! A program that wraps and unwraps: `PROGRAM wrap|unwrap NAME`, bytes in by standard input, out by standard output.

use std::collections::HashMap;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quarry_objfmt::{KeyName, TenantName};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zeroize::Zeroizing;

use super::{HOOK_ANSWER_MAX, HOOK_TIME_MAX, KeyError};

/// Between two looks whether it has ended.
const LOOK_STEP: Duration = Duration::from_millis(5);

/// What of its complaint is told.
const COMPLAINT_CHARS_MAX: usize = 200;

/// Programs under way at once. Each holds one of the runtime's 512 blocking threads for as long as it takes: chunks are
/// encoded and the audit log is written by the same, and must not wait for a slow key.
const PROGRAMS_MAX: usize = 32;

/// Of these, a tenant's: as many as a volume's keys are asked for at once. One whose keys are slow leaves the others three
/// quarters.
const TENANT_PROGRAMS_MAX: usize = 8;

#[derive(Debug)]
pub(super) struct Command {
    program: PathBuf,
    places: Arc<Semaphore>,
    tenant_places: usize,
    /// Places of tenants that have one, or wait for one.
    tenants: Mutex<HashMap<TenantName, Weak<Semaphore>>>,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the program {}", self.program.display())
    }
}

impl Command {
    pub(super) fn new(program: &Path) -> Self {
        Self::with_places(program, PROGRAMS_MAX, TENANT_PROGRAMS_MAX)
    }

    fn with_places(program: &Path, places: usize, tenant_places: usize) -> Self {
        Self {
            program: program.to_owned(),
            places: Arc::new(Semaphore::new(places)),
            tenant_places,
            tenants: Mutex::default(),
        }
    }

    /// Asks it on behalf of `tenant`; without one, of the daemon itself.
    pub(super) async fn ask(
        &self,
        tenant: Option<&TenantName>,
        what: &'static str,
        key: &KeyName,
        input: Zeroizing<Vec<u8>>,
    ) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let asked = self.call(tenant, what, key, input).await;
        asked.map_err(|why| KeyError::Unavailable {
            by: self.to_string(),
            key: key.clone(),
            why,
        })
    }

    async fn call(
        &self,
        tenant: Option<&TenantName>,
        what: &'static str,
        key: &KeyName,
        input: Zeroizing<Vec<u8>>,
    ) -> Result<Zeroizing<Vec<u8>>, String> {
        let place = tokio::time::timeout(HOOK_TIME_MAX, self.place(tenant));
        let place = place
            .await
            .map_err(|_| "too many others are asked for keys".to_owned())?;
        let (program, name) = (self.program.clone(), key.to_string());
        let ran = move || {
            // Held to its end, also if nobody waits for it any more.
            let _place = place;
            run(&program, &[what, &name], input, HOOK_TIME_MAX)
        };
        let ran = tokio::task::spawn_blocking(ran).await;
        ran.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Waits for a place: of the tenant's own first, so that who waits for one of those holds none of all.
    async fn place(&self, tenant: Option<&TenantName>) -> [Option<OwnedSemaphorePermit>; 2] {
        // The semaphores are never closed.
        let own = match tenant {
            Some(tenant) => self.places_of(tenant).acquire_owned().await.ok(),
            None => None,
        };
        [own, Arc::clone(&self.places).acquire_owned().await.ok()]
    }

    fn places_of(&self, tenant: &TenantName) -> Arc<Semaphore> {
        let mut tenants = self.tenants.lock();
        tenants.retain(|_, places| places.strong_count() > 0);
        if let Some(places) = tenants.get(tenant).and_then(Weak::upgrade) {
            return places;
        }
        let places = Arc::new(Semaphore::new(self.tenant_places));
        tenants.insert(tenant.clone(), Arc::downgrade(&places));
        places
    }
}

/// Ends with its process, however it is left.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // With what it started, which may hold its pipes. It may have ended already, which is what is wanted.
        if let Some(group) = Pid::from_raw(self.0.id().cast_signed()) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the program prints if it succeeds in time. Its pipes are served by threads of their own, which end with it: by
/// then both are read, or nobody cares.
fn run(
    program: &Path,
    arguments: &[&str],
    input: Zeroizing<Vec<u8>>,
    time_max: Duration,
) -> Result<Zeroizing<Vec<u8>>, String> {
    let begun = Instant::now();
    let child = std::process::Command::new(program)
        .args(arguments)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut running = Running(child.map_err(|error| format!("it cannot be started: {error}"))?);
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (
        running.0.stdin.take(),
        running.0.stdout.take(),
        running.0.stderr.take(),
    ) else {
        return Err("it has no pipes".to_owned());
    };
    // A program that ends without reading is judged by how it ends.
    std::thread::spawn(move || drop(stdin.write_all(&input)));
    let (told, answer) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // In one allocation, so that none is left behind unwiped.
        let mut out = Zeroizing::new(Vec::with_capacity(HOOK_ANSWER_MAX + 1));
        let limited = &mut stdout.take(HOOK_ANSWER_MAX as u64 + 1);
        let read = limited.read_to_end(&mut out).map(|_| out);
        // Nobody listens if it took too long.
        let _ = told.send(read);
    });
    let (told, complaint) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut words = Vec::new();
        let limited = &mut stderr.take(HOOK_ANSWER_MAX as u64);
        let _ = limited.read_to_end(&mut words);
        let _ = told.send(words);
    });
    let left = || time_max.saturating_sub(begun.elapsed());
    let late = || format!("it took more than {} s", time_max.as_secs_f64());
    let status = loop {
        match running.0.try_wait().map_err(|error| error.to_string())? {
            Some(status) => break status,
            None if left().is_zero() => return Err(late()),
            None => std::thread::sleep(LOOK_STEP),
        }
    };
    let flood = || format!("it answers more than {HOOK_ANSWER_MAX} bytes");
    let is_flood = |out: &Zeroizing<Vec<u8>>| out.len() > HOOK_ANSWER_MAX;
    if !status.success() {
        // It may have ended because nobody read on.
        if let Ok(Ok(out)) = answer.try_recv()
            && is_flood(&out)
        {
            return Err(flood());
        }
        let words = complaint.recv_timeout(left()).unwrap_or_default();
        let words = String::from_utf8_lossy(&words);
        let first = words.lines().next().unwrap_or_default();
        let first: String = first.chars().take(COMPLAINT_CHARS_MAX).collect();
        return Err(format!("it ended with {status}: {first}"));
    }
    // Something that it left behind may keep the pipe open.
    let out = answer.recv_timeout(left()).map_err(|_| late())?;
    let out = out.map_err(|error| format!("its answer cannot be read: {error}"))?;
    match is_flood(&out) {
        true => Err(flood()),
        false => Ok(out),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn shell(script: &str, time_max: Duration) -> Result<Zeroizing<Vec<u8>>, String> {
        let input = Zeroizing::new(b"in".to_vec());
        run(Path::new("/bin/sh"), &["-c", script], input, time_max)
    }

    /// How many were under way when each of the programs that wrote `file` looked.
    fn counts(file: &Path) -> Vec<usize> {
        let text = std::fs::read_to_string(file).unwrap();
        let count = |line: &str| line.trim().parse().unwrap();
        text.lines().map(count).collect()
    }

    #[tokio::test]
    async fn programs_under_way_are_no_more_than_there_are_places_for_all_and_for_a_tenant() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("kms");
        let script = format!(
            "#!/bin/sh\ncd {} || exit 1\n: > under.$2.$$\nls | grep -c '^under' >> all\nls | grep -c \"^under.$2\" >> of.$2\nsleep 0.2\nrm under.$2.$$\ncat\n",
            dir.path().display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        let command = Command::with_places(&program, 4, 2);
        let names = ["acme", "other", "zebra"];
        let tenants =
            names.map(|name| (TenantName::new(name).unwrap(), KeyName::new(name).unwrap()));
        let asks = tenants.iter().flat_map(|tenant| [tenant; 3]);
        let asks = asks.map(|(tenant, key)| {
            let input = Zeroizing::new(b"in".to_vec());
            command.ask(Some(tenant), "wrap", key, input)
        });
        for answer in futures::future::join_all(asks).await {
            assert_eq!(*answer.unwrap(), b"in");
        }
        let all = counts(&dir.path().join("all"));
        assert_eq!(all.len(), 9);
        assert!(all.iter().all(|count| *count <= 4), "{all:?}");
        for name in names {
            let own = counts(&dir.path().join(format!("of.{name}")));
            assert!(own.iter().all(|count| *count <= 2), "{name}: {own:?}");
        }
        assert_eq!(command.places.available_permits(), 4);
    }

    #[test]
    fn program_that_answers_fails_floods_or_hangs_is_told_apart() {
        let long = Duration::from_secs(20);
        assert_eq!(*shell("cat; echo out", long).unwrap(), b"inout\n");
        assert_eq!(*shell("echo out", long).unwrap(), b"out\n");
        let failed = shell("echo no such key >&2; exit 3", long).unwrap_err();
        assert!(failed.contains("3: no such key"), "{failed}");
        let flooded = shell("head -c 70000 /dev/zero", long).unwrap_err();
        assert!(flooded.contains("more than 65536 bytes"), "{flooded}");
        let begun = Instant::now();
        for hangs in ["exec sleep 60", "sleep 5 & exit 0"] {
            let late = shell(hangs, Duration::from_millis(200)).unwrap_err();
            assert!(late.contains("more than 0.2 s"), "{late}");
        }
        assert!(begun.elapsed() < long);
        let gone = run(
            Path::new("/no/such/program"),
            &[],
            Zeroizing::default(),
            long,
        );
        assert!(gone.unwrap_err().contains("cannot be started"));
    }
}
