//! `quarry volume attach --ensure`: for units and scripts that want a volume attached, whoever attached it, and that
//! run while the daemon or its store may not be there yet.

use std::time::Duration;

use super::Failure;
use super::progress::shown;
use crate::control::{
    ApiError, AttachInfo, AttachOptions, AttachedInfo, Client, ImageRef, Kind, State, Via,
};

/// Between two tries while there is nobody to ask.
const PAUSE: Duration = Duration::from_secs(1);

/// Attaches, or finds it attached as `options` wants it; waits for what does not answer, as long as its caller does.
///
/// # Errors
/// What trying again does not mend.
pub(super) async fn attach(
    client: &Client,
    image: &ImageRef,
    options: &AttachOptions,
) -> Result<AttachInfo, Failure> {
    let mut said = String::new();
    loop {
        let error = match shown("attaching", image, client.attach(image, options)).await {
            Ok(attached) => return Ok(attached),
            Err(error) => error,
        };
        match error.kind {
            Kind::Conflict => match attached_now(client, image).await {
                Ok(Some(attached)) => return fitting(image, &attached, options),
                Ok(None) => return Err(error.into()),
                // The daemon has just ended.
                Err(error) if error.kind == Kind::Unavailable => {}
                Err(error) => return Err(error.into()),
            },
            Kind::Unavailable if error.message != said => {
                eprintln!("quarry: {}; waiting", error.message);
                said = error.message;
            }
            Kind::Unavailable => {}
            _ => return Err(error.into()),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn attached_now(client: &Client, image: &ImageRef) -> Result<Option<AttachedInfo>, ApiError> {
    let info = client.show_volume(image).await?;
    Ok(info.attached.filter(|_| info.state == State::Attached))
}

/// How it is attached, if that will do. Owner, mode and queues are what they are.
fn fitting(
    image: &ImageRef,
    attached: &AttachedInfo,
    options: &AttachOptions,
) -> Result<AttachInfo, Failure> {
    let via = options.via.unwrap_or(attached.via);
    let what = match () {
        () if via != attached.via && attached.via == Via::Nbd => "by NBD, not as a block device",
        () if via != attached.via => "as a block device, not by NBD",
        () if attached.read_only && !options.read_only => "for reading only",
        () => {
            return Ok(AttachInfo {
                volume: image.to_string(),
                via: attached.via,
                device: attached.device.clone(),
                link: attached.link.clone(),
                uri: attached.uri.clone(),
                warning: (options.read_only && !attached.read_only).then(|| {
                    format!("writes let through, as it was attached so before; for reading only, detach it first: `quarry volume detach {image}`")
                }),
            });
        }
    };
    let remedy = format!("detach it first: `quarry volume detach {image}`");
    Err(Failure::new(
        "conflict",
        format!("{image} is attached {what}"),
        remedy,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With the warning, if there is one.
    fn fits(
        via: Option<Via>,
        read_only: bool,
        attached: &AttachedInfo,
    ) -> Result<Option<String>, String> {
        let image: ImageRef = "acme/db".parse().unwrap();
        let options = AttachOptions {
            via,
            read_only,
            ..AttachOptions::default()
        };
        match fitting(&image, attached, &options) {
            Ok(info) => {
                assert_eq!(info.device, attached.device);
                Ok(info.warning)
            }
            Err(failure) => Err(failure.message),
        }
    }

    #[test]
    fn attached_volume_fits_if_it_can_be_used_as_was_asked() {
        let mut attached = AttachedInfo {
            via: Via::Ublk,
            device: Some("/dev/ublkb0".to_owned()),
            ..AttachedInfo::default()
        };
        assert_eq!(fits(None, false, &attached), Ok(None));
        assert_eq!(fits(Some(Via::Ublk), false, &attached), Ok(None));
        let wrong = fits(Some(Via::Nbd), false, &attached).unwrap_err();
        assert_eq!(wrong, "acme/db is attached as a block device, not by NBD");
        attached.read_only = true;
        assert_eq!(fits(None, true, &attached), Ok(None));
        let wrong = fits(None, false, &attached).unwrap_err();
        assert_eq!(wrong, "acme/db is attached for reading only");
    }

    #[test]
    fn volume_attached_for_writing_where_reading_was_asked_for_is_warned_of() {
        let attached = AttachedInfo {
            via: Via::Nbd,
            ..AttachedInfo::default()
        };
        let warning = fits(None, true, &attached).unwrap().unwrap();
        assert!(warning.starts_with("writes let through"), "{warning}");
    }
}
