//! A Prometheus that scrapes one daemon, with the rules of this repository.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{free_port, tool};

/// How long it may take to come up, and to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The times that a question is about, in seconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The first of them.
    pub from: u64,
    /// No later than this.
    pub to: u64,
    /// From one to the next.
    pub step: u64,
}

/// What one set of labels had over a time.
#[derive(Clone, Debug)]
pub struct Series {
    /// Values of labels, by their names.
    pub labels: BTreeMap<String, String>,
    /// Seconds since 1970, each with a figure; what is no number is not in it.
    pub samples: Vec<(f64, f64)>,
}

/// A running Prometheus, on the loopback interface only; ended with it.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
}

impl Prometheus {
    /// Starts one in `dir` that scrapes `target` and evaluates `rules` every second. `None`, and the test is skipped, if
    /// it is not installed.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(dir: &Path, target: SocketAddr, rules: &[PathBuf]) -> Result<Option<Self>> {
        let Some(program) = tool("prometheus") else {
            return Ok(None);
        };
        fs::create_dir_all(dir)?;
        let mut config = format!(
            "global: {{ scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s }}\n\
             scrape_configs: [{{ job_name: quarry, static_configs: [{{ targets: ['{target}'] }}] }}]\n\
             rule_files:\n"
        );
        for file in rules {
            config.push_str(&format!("  - '{}'\n", file.display()));
        }
        let file = dir.join("prometheus.yml");
        fs::write(&file, config)?;
        let log = dir.join("prometheus.log");
        let output = fs::File::create(&log)?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, free_port()).into();
        let mut command = program.command();
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.join("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let mut server = Self {
            child,
            address,
            log,
        };
        let begun = Instant::now();
        while server.get("/-/ready").is_err() {
            let ended = server.child.try_wait()?;
            ensure!(
                ended.is_none() && begun.elapsed() < PATIENCE,
                "Prometheus does not come up ({ended:?}):\n{}",
                fs::read_to_string(&server.log)?
            );
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Some(server))
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("not HTTP")?;
        let status = head.split_whitespace().nth(1).unwrap_or_default();
        // A query that is wrong is answered with 400 and what is wrong with it.
        if status != "200" {
            bail!("{path} answers {status}: {body}");
        }
        Ok(body.to_owned())
    }

    fn data(&self, path: &str) -> Result<Value> {
        let mut answer: Value = serde_json::from_str(&self.get(path)?)?;
        ensure!(answer["status"] == "success", "{path}: {answer}");
        Ok(answer["data"].take())
    }

    /// The values of an expression now, one for each series.
    ///
    /// # Errors
    /// If it is no expression.
    pub fn query(&self, expression: &str) -> Result<Vec<f64>> {
        let data = self.data(&format!("/api/v1/query?query={}", escaped(expression)))?;
        let result = data["result"].as_array().context("a vector")?;
        let value = |sample: &Value| sample["value"][1].as_str()?.parse().ok();
        let values: Option<Vec<f64>> = result.iter().map(value).collect();
        values.with_context(|| format!("{expression}: {data}"))
    }

    /// What an expression was over a time.
    ///
    /// # Errors
    /// If it is no expression.
    pub fn range(&self, expression: &str, window: Window) -> Result<Vec<Series>> {
        let Window { from, to, step } = window;
        let query = escaped(expression);
        let data = self.data(&format!(
            "/api/v1/query_range?query={query}&start={from}&end={to}&step={step}"
        ))?;
        let result = data["result"].as_array().context("a matrix")?;
        let series = result.iter().map(series).collect::<Option<_>>();
        series.with_context(|| format!("{expression}: {data}"))
    }

    /// All rules, as it has them.
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn rules(&self) -> Result<Vec<Value>> {
        let data = self.data("/api/v1/rules")?;
        let groups = data["groups"].as_array().context("groups")?;
        let rules = groups.iter().filter_map(|group| group["rules"].as_array());
        Ok(rules.flatten().cloned().collect())
    }

    /// Names of the alerts that fire now.
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn firing(&self) -> Result<Vec<String>> {
        let data = self.data("/api/v1/alerts")?;
        let alerts = data["alerts"].as_array().context("alerts")?;
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        let names = firing.filter_map(|alert| alert["labels"]["alertname"].as_str());
        Ok(names.map(str::to_owned).collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn series(answer: &Value) -> Option<Series> {
    let labels = answer["metric"].as_object()?.iter();
    let labels = labels.map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
    let samples = answer["values"].as_array()?.iter();
    let samples =
        samples.map(|sample| Some((sample[0].as_f64()?, sample[1].as_str()?.parse().ok()?)));
    let mut samples: Vec<(f64, f64)> = samples.collect::<Option<_>>()?;
    samples.retain(|(_, figure)| figure.is_finite());
    let labels = labels.collect::<Option<_>>()?;
    Some(Series { labels, samples })
}

/// As it stands in a URL's query.
fn escaped(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}
