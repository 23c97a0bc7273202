//! A volume, reached for the time of a copy: attached by NBD, unless it is attached already.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Failure;
use super::progress::{shown, uploading};
use crate::control::{AttachOptions, AttachedInfo, Client, ImageRef, State, Via, VolumeInfo};
use crate::image::Disk;
use crate::nbd;

/// How long an interrupted command tries to leave things as they were.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(5);

/// How long a volume may take to be attached or detached by somebody else.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);

/// Wait between two looks at it.
const SETTLE_PAUSE: Duration = Duration::from_millis(200);

/// Where a volume is.
enum Place {
    Nbd { socket: PathBuf, export: String },
    Device(PathBuf),
}

/// A volume that is attached here.
pub(super) struct Attachment<'a> {
    client: &'a Client,
    volume: ImageRef,
    place: Place,
    /// The address, if it is one of NBD.
    pub uri: Option<String>,
    /// Whether it was attached for this command.
    pub ours: bool,
    /// Whether somebody else may be writing to it.
    pub in_use: bool,
}

impl<'a> Attachment<'a> {
    /// Attaches a volume by NBD, or finds it attached.
    ///
    /// # Errors
    /// If it can be used by this command neither way.
    pub async fn take(
        client: &'a Client,
        volume: &ImageRef,
        info: &VolumeInfo,
        read_only: bool,
    ) -> Result<Self, Failure> {
        let info = settled(client, volume, info).await?;
        let found = match (info.state, &info.attached) {
            (State::Detached, _) => None,
            (State::Attached, Some(attached)) => Some(attached),
            // What it takes no more can still be read, with what was not sent.
            (State::Fenced, Some(attached)) if read_only => Some(attached),
            (State::AttachedElsewhere, _) => {
                let owner = info.owner.as_ref().map_or("another host", |o| &o.host);
                let message = format!("{volume} is attached on {owner}");
                return Err(conflict(message, "do this there, or detach it there first"));
            }
            (state, _) => {
                let message = format!("{volume} is {}", state.as_str());
                let remedy = match &info.problem {
                    Some(problem) if state == State::Attaching => {
                        format!("it cannot be attached again ({problem}): wait, or detach it")
                    }
                    _ => format!("see `quarry volume show {volume}`"),
                };
                return Err(conflict(message, &remedy));
            }
        };
        let attached = match found {
            Some(attached) => {
                if !read_only {
                    writable(volume, attached)?;
                }
                attached.clone()
            }
            None => {
                let options = AttachOptions {
                    via: Some(Via::Nbd),
                    read_only,
                    ..AttachOptions::default()
                };
                let made = shown("attaching", volume, client.attach(volume, &options)).await?;
                AttachedInfo {
                    via: made.via,
                    uri: made.uri,
                    read_only,
                    ..AttachedInfo::default()
                }
            }
        };
        Ok(Self {
            client,
            volume: volume.clone(),
            place: place(&attached)?,
            uri: attached.uri,
            ours: found.is_none(),
            in_use: found.is_some() && !attached.read_only && info.state != State::Fenced,
        })
    }

    /// One more way to its data.
    ///
    /// # Errors
    /// If it is not there.
    pub fn connect(&self) -> Result<Disk, Failure> {
        match &self.place {
            Place::Nbd { socket, export } => nbd::client::Client::connect_mapped(socket, export)
                .map(Disk::Nbd)
                .map_err(|error| self.unreachable(&error)),
            Place::Device(path) => {
                let open = || {
                    let mut file = File::open(path)?;
                    let size = file.seek(SeekFrom::End(0))?;
                    let file = Arc::new(file);
                    Ok(Disk::File { file, size })
                };
                open().map_err(|error: std::io::Error| self.unreachable(&error))
            }
        }
    }

    fn unreachable(&self, error: &dyn std::error::Error) -> Failure {
        let place = match &self.place {
            Place::Nbd { socket, .. } => socket.display(),
            Place::Device(path) => path.display(),
        };
        let message = format!("{} cannot be reached at {place}: {error}", self.volume);
        let remedy =
            "run this on the daemon's host, as root or as one who may use its sockets and devices";
        Failure::new("unavailable", message, remedy)
    }

    /// Detaches it.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn detach(&self) -> Result<(), Failure> {
        let call = self.client.detach(&self.volume);
        uploading("detaching", self.client, &self.volume, call).await?;
        Ok(())
    }

    /// Detaches it if it was attached for this command, as well as that can be done now: something else
    /// has gone wrong, which is told instead.
    pub async fn leave(&self) {
        if self.ours {
            let _ = tokio::time::timeout(LEAVE_TIME_MAX, self.client.detach(&self.volume)).await;
        }
    }
}

/// The volume, when it is not on its way to be attached or detached any more: after a restart of the daemon it
/// soon is what it was.
async fn settled(
    client: &Client,
    image: &ImageRef,
    info: &VolumeInfo,
) -> Result<VolumeInfo, Failure> {
    let mut info = info.clone();
    let begun = Instant::now();
    while matches!(info.state, State::Attaching | State::Detaching)
        && begun.elapsed() < SETTLE_TIME_MAX
    {
        tokio::time::sleep(SETTLE_PAUSE).await;
        info = client.show_volume(image).await?;
    }
    Ok(info)
}

fn conflict(message: String, remedy: &str) -> Failure {
    Failure::new("conflict", message, remedy)
}

/// Refuses an attachment that cannot be written through, or whose user is the kernel.
fn writable(volume: &ImageRef, attached: &AttachedInfo) -> Result<(), Failure> {
    let remedy = format!("detach it first: `quarry volume detach {volume}`");
    if let Some(device) = &attached.device {
        let message = format!("{volume} is attached as {device}, and may be in use");
        return Err(conflict(message, &remedy));
    }
    if attached.read_only {
        let message = format!("{volume} is attached read-only");
        return Err(conflict(message, &remedy));
    }
    Ok(())
}

fn place(attached: &AttachedInfo) -> Result<Place, Failure> {
    if let Some(device) = &attached.device {
        return Ok(Place::Device(PathBuf::from(device)));
    }
    let uri = attached.uri.as_deref().unwrap_or("");
    let parsed = url::Url::parse(uri).ok();
    let socket = parsed.as_ref().and_then(|uri| {
        let mut pairs = uri.query_pairs();
        pairs.find_map(|(key, value)| (key == "socket").then(|| value.into_owned()))
    });
    match (parsed, socket) {
        (Some(uri), Some(socket)) => Ok(Place::Nbd {
            socket: PathBuf::from(socket),
            export: uri.path().trim_start_matches('/').to_owned(),
        }),
        _ => Err(Failure::new(
            "internal",
            format!("the daemon gives {uri:?} for the address of a volume"),
            "check that client and daemon have the same version",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::AttachInfo;

    #[test]
    fn attachment_that_the_kernel_or_nobody_writes_through_takes_no_import() {
        let volume = "acme/db".parse().unwrap();
        let nbd = AttachedInfo::default();
        writable(&volume, &nbd).unwrap();
        for attached in [
            AttachedInfo {
                device: Some("/dev/ublkb0".to_owned()),
                ..nbd.clone()
            },
            AttachedInfo {
                read_only: true,
                ..nbd
            },
        ] {
            assert_eq!(writable(&volume, &attached).unwrap_err().kind, "conflict");
        }
    }

    #[test]
    fn place_of_an_odd_socket_is_its_path() {
        let socket = std::path::Path::new("/my dir/50%&+.sock");
        let info = AttachInfo::nbd(&"acme/db".parse().unwrap(), socket);
        let attached = AttachedInfo {
            uri: info.uri,
            ..AttachedInfo::default()
        };
        match place(&attached).unwrap() {
            Place::Nbd {
                socket: found,
                export,
            } => {
                assert_eq!(found, socket);
                assert_eq!(export, "acme/db");
            }
            Place::Device(path) => panic!("{path:?}"),
        }
        assert!(place(&AttachedInfo::default()).is_err());
    }
}
