//! Programs that a test needs beside the daemon, and what happens where one is missing.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

/// A program found on this machine.
#[derive(Clone, Debug)]
pub struct Tool {
    path: PathBuf,
}

impl Tool {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// A command that starts it.
    #[must_use]
    pub fn command(&self) -> Command {
        Command::new(&self.path)
    }
}

/// The program `name`, from `$QUARRY_TOOLS/bin`, `target/tools/bin` or the `PATH`; if it is nowhere,
/// the test is reported as skipped and `None` comes back.
#[must_use]
pub fn tool(name: &str) -> Option<Tool> {
    let mut places = Vec::new();
    if let Some(tools) = env::var_os("QUARRY_TOOLS") {
        places.push(PathBuf::from(tools).join("bin"));
    }
    places.push(target_dir().join("tools/bin"));
    if let Some(path) = env::var_os("PATH") {
        places.extend(env::split_paths(&path));
    }
    places.push(PathBuf::from("/usr/sbin"));
    places.push(PathBuf::from("/sbin"));
    let found = places
        .into_iter()
        .map(|place| place.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        skip(&format!("the program {name} is not installed"));
    }
    found.map(|path| Tool { path })
}

/// Says that the running test cannot be done here, and why. With `QUARRY_SKIPPED=FILE` the reason is
/// also appended to that file, where `tests/run` counts it.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("SKIPPED {}: {reason}", thread.name().unwrap_or("a test"));
    println!("{line}");
    if let Some(path) = env::var_os("QUARRY_SKIPPED") {
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| writeln!(file, "{line}"));
        if let Err(error) = written {
            eprintln!("cannot note that in {}: {error}", path.display());
        }
    }
}

/// The cargo target directory that this test was built in.
///
/// # Panics
/// If the test binary is not where cargo puts it.
#[must_use]
pub fn target_dir() -> PathBuf {
    let test = env::current_exe().expect("a process knows its own path");
    test.ancestors()
        .nth(3)
        .expect("a test binary lies in target/PROFILE/deps")
        .to_path_buf()
}

/// The kernel of the virtual machines, if `tests/vm/build-uml.sh` has made one.
#[must_use]
pub fn vm_kernel() -> Option<PathBuf> {
    let path = match (
        env::var_os("QUARRY_VM_KERNEL"),
        env::var_os("QUARRY_VM_CACHE"),
    ) {
        (Some(kernel), _) => PathBuf::from(kernel),
        (None, Some(cache)) => PathBuf::from(cache).join("linux"),
        (None, None) => target_dir().join("vm/linux"),
    };
    if path.is_file() {
        return Some(path);
    }
    skip(&format!(
        "no kernel at {} (tests/vm/build-uml.sh makes it)",
        path.display()
    ));
    None
}

/// A TCP port of the loopback interface that nothing listened on a moment ago, with `port + 10000`
/// free as well, and given to nobody else for as long as this process lives.
///
/// # Panics
/// If none can be found.
#[must_use]
pub fn free_port() -> u16 {
    static LOCKS: Mutex<Vec<File>> = Mutex::new(Vec::new());
    for _ in 0..1000 {
        // Below the range that the kernel hands to outgoing connections.
        let port = rand::random_range(12_000..22_000);
        let free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        if let Some(lock) = lock_port(port)
            && free(port)
            && free(port + 10_000)
        {
            let mut locks = LOCKS.lock().expect("no holder of this lock panics");
            locks.push(lock);
            return port;
        }
    }
    panic!("no free TCP port found on the loopback interface");
}

/// The right to a port, unless somebody has it: tests draw side by side, each in a process of its own.
fn lock_port(port: u16) -> Option<File> {
    // Beside the program: the bench lies elsewhere in the target directory than tests do.
    let program = env::current_exe().expect("a process knows its own path");
    let dir = program.with_file_name("ports");
    fs::create_dir_all(&dir).expect("the target directory can be written to");
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .open(dir.join(format!("port-{port}")))
        .expect("the target directory can be written to");
    file.try_lock().ok().map(|()| file)
}
