//! SeaweedFS: a real S3 server of its own for each test, on the loopback interface.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::{free_port, tool};

pub(crate) const ACCESS_KEY: &str = "quarry-tests";
pub(crate) const SECRET_KEY: &str = "not-a-secret";
/// How long the server may take to come up.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// From an HTTP port to its gRPC port.
const GRPC: u16 = 10_000;

/// A running server.
#[derive(Debug)]
pub struct SeaweedFs {
    child: Child,
    address: SocketAddr,
    filer: SocketAddr,
    log: PathBuf,
}

impl SeaweedFs {
    /// Starts a server with its data in `dir`, or reports the test as skipped if the program `weed` is
    /// not installed (`tests/tools/install.sh` installs it).
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(dir: &Path) -> Result<Option<Self>> {
        let Some(weed) = tool("weed") else {
            return Ok(None);
        };
        let data = dir.join("seaweedfs");
        fs::create_dir_all(&data)?;
        let identities = dir.join("seaweedfs.json");
        let keys = serde_json::json!({"identities": [{
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }]});
        fs::write(&identities, keys.to_string())?;
        let log = dir.join("seaweedfs.log");
        let output = File::create(&log)?;
        let (port, filer) = (free_port(), free_port());
        let mut command = weed.command();
        command
            .args(["-logtostderr", "server", "-s3", "-filer"])
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1"])
            .args(["-master.telemetry=false", "-master.volumePreallocate=false"])
            // Many small volumes, so that no bucket waits for room.
            .args(["-master.volumeSizeLimitMB=256", "-volume.max=200"])
            .arg("-volume.preStopSeconds=0")
            .arg("-s3.iam=false")
            .args(["-s3.port.iceberg=0", "-s3.port.lance=0"])
            .arg(format!("-dir={}", data.display()))
            .arg(format!("-s3.config={}", identities.display()));
        for (role, port) in [
            ("master", free_port()),
            ("volume", free_port()),
            ("filer", filer),
            ("s3", port),
        ] {
            command.arg(format!("-{role}.port={port}"));
            command.arg(format!("-{role}.port.grpc={}", port + GRPC));
        }
        // Its working directory and home, so that no settings of the machine apply.
        command.current_dir(dir).env("HOME", dir);
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("{command:?}"))?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port).into();
        let mut server = Self {
            child,
            address,
            filer: SocketAddrV4::new(Ipv4Addr::LOCALHOST, filer).into(),
            log,
        };
        server.await_ready()?;
        Ok(Some(server))
    }

    fn await_ready(&mut self) -> Result<()> {
        let begun = Instant::now();
        while !self.is_ready() {
            let ended = self.child.try_wait()?;
            ensure!(
                ended.is_none() && begun.elapsed() < START_PATIENCE,
                "SeaweedFS does not come up ({ended:?}):\n{}",
                fs::read_to_string(&self.log)?
            );
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Whether the S3 port answers, and its filer behind it.
    fn is_ready(&self) -> bool {
        let asked = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(self.address)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        asked().is_ok_and(|answer| answer.split_whitespace().nth(1) == Some("200"))
    }

    /// Where its S3 port is.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The objects of a bucket and their bytes, as the server's own file system has them.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn objects(&self, bucket: &str) -> Result<BTreeMap<String, u64>> {
        let mut objects = BTreeMap::new();
        let mut dirs = vec![String::new()];
        while let Some(dir) = dirs.pop() {
            let mut last = String::new();
            loop {
                let path = format!("/buckets/{bucket}/{dir}?limit=1000&lastFileName={last}");
                let page = self.filer_json(&path)?;
                let entries = page["Entries"].as_array().cloned().unwrap_or_default();
                for entry in &entries {
                    let full = entry["FullPath"].as_str().context("no path")?;
                    let key = full
                        .strip_prefix(&format!("/buckets/{bucket}/"))
                        .context("of another bucket")?;
                    // A folder has the mode bit of one.
                    if entry["Mode"].as_u64().unwrap_or(0) & 1 << 31 == 0 {
                        objects.insert(key.to_owned(), entry["FileSize"].as_u64().unwrap_or(0));
                    } else {
                        dirs.push(format!("{key}/"));
                    }
                }
                if page["ShouldDisplayLoadMore"] != true {
                    break;
                }
                last = page["LastFileName"].as_str().unwrap_or_default().to_owned();
            }
        }
        Ok(objects)
    }

    fn filer_json(&self, path: &str) -> Result<serde_json::Value> {
        let mut stream = TcpStream::connect(self.filer)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let request = format!("GET {path} HTTP/1.0\r\nAccept: application/json\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.contains(" 200 "), "{path}: {head}");
        serde_json::from_str(body).with_context(|| format!("{path}: {body}"))
    }

    /// The variables with which a client reaches it at `address`: its own, or a proxy's.
    #[must_use]
    pub fn client_environment(&self, address: SocketAddr) -> Vec<(String, String)> {
        client_environment(address)
    }
}

/// The variables with which a client reaches a server of these tests at `address`.
pub(crate) fn client_environment(address: SocketAddr) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

impl Drop for SeaweedFs {
    fn drop(&mut self) {
        // Its data go with the test's directory, so nothing needs an orderly end. It may have ended
        // already, which is what is wanted too.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seaweedfs_started_answers_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        if let Some(server) = SeaweedFs::start(dir.path()).unwrap() {
            assert!(server.is_ready());
        }
    }
}
