//! A program that wraps and unwraps: `PROGRAM wrap|unwrap NAME`, bytes in by standard input, out by standard output.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use quarry_objfmt::KeyName;
use rustix::process::{Pid, Signal, kill_process_group};
use zeroize::Zeroizing;

use super::{HOOK_ANSWER_MAX, HOOK_TIME_MAX, KeyError};

/// Between two looks whether it has ended.
const LOOK_STEP: Duration = Duration::from_millis(5);

/// What of its complaint is told.
const COMPLAINT_CHARS_MAX: usize = 200;

#[derive(Clone, Debug)]
pub(super) struct Command(PathBuf);

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the program {}", self.0.display())
    }
}

impl Command {
    pub(super) fn new(program: &Path) -> Self {
        Self(program.to_owned())
    }

    pub(super) async fn ask(
        &self,
        what: &'static str,
        key: &KeyName,
        input: Zeroizing<Vec<u8>>,
    ) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let (program, name) = (self.0.clone(), key.to_string());
        let ran = move || run(&program, &[what, &name], input, HOOK_TIME_MAX);
        let ran = tokio::task::spawn_blocking(ran).await;
        let ran = ran.unwrap_or_else(|error| Err(error.to_string()));
        ran.map_err(|why| KeyError::Unavailable {
            by: self.to_string(),
            key: key.clone(),
            why,
        })
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
    use super::*;

    fn shell(script: &str, time_max: Duration) -> Result<Zeroizing<Vec<u8>>, String> {
        let input = Zeroizing::new(b"in".to_vec());
        run(Path::new("/bin/sh"), &["-c", script], input, time_max)
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
