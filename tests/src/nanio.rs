//! nanio: an S3 server that answers every precondition with success, and so must be refused.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::seaweed::{ACCESS_KEY, SECRET_KEY, client_environment};
use crate::{free_port, tool};

/// How long the server may take to come up.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// A running server.
#[derive(Debug)]
pub struct Nanio {
    child: Child,
    address: SocketAddr,
}

impl Nanio {
    /// Starts a server with its data in `dir`, or reports the test as skipped if the program `nanio`
    /// is not installed (`tests/tools/install.sh` installs it).
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(dir: &Path) -> Result<Option<Self>> {
        let Some(nanio) = tool("nanio") else {
            return Ok(None);
        };
        let data = dir.join("nanio");
        fs::create_dir_all(&data)?;
        let log = dir.join("nanio.log");
        let output = File::create(&log)?;
        let port = free_port();
        let mut command = nanio.command();
        command
            .args(["serve", "--host", "127.0.0.1", "--port", &port.to_string()])
            .arg("--data-dir")
            .arg(&data)
            .env("NANIO_ACCESS_KEY", ACCESS_KEY)
            .env("NANIO_SECRET_KEY", SECRET_KEY)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port).into();
        let mut server = Self { child, address };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            let ended = server.child.try_wait()?;
            ensure!(
                ended.is_none() && begun.elapsed() < START_PATIENCE,
                "nanio does not come up ({ended:?}):\n{}",
                fs::read_to_string(&log)?
            );
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Some(server))
    }

    /// The variables with which a client reaches it.
    #[must_use]
    pub fn client_environment(&self) -> Vec<(String, String)> {
        client_environment(self.address)
    }
}

impl Drop for Nanio {
    fn drop(&mut self) {
        // It may have ended already, which is what is wanted too.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
