//! Whether a volume's misses go around the daemon's memory, and if not, why.
//!
//! A wish that cannot be met does not keep a volume from being attached, at a restart least of all:
//! it is told, in the answer to the attach, in the log and for as long as the volume is attached.

use quarry_objfmt::{Compression, Encryption};
use quarry_volume::Event;

use super::slot::Attached;
use crate::control::Via;
use crate::ublk::Mode;

impl Attached {
    /// Whether its misses can go around the daemon's memory, attached by `via`.
    pub(super) fn can_read_directly(&self, via: Via) -> Result<(), String> {
        let head = self.backend.head().get();
        if via == Via::Nbd {
            return Err("NBD passes its data through the daemon".to_owned());
        }
        if head.compression != Compression::None {
            return Err(format!(
                "the volume was created with --compression {}",
                head.compression
            ));
        }
        if head.encryption != Encryption::None {
            return Err("the volume is encrypted".to_owned());
        }
        match &***self.tenant.direct() {
            Ok(_) => Ok(()),
            Err(why) => Err(why.clone()),
        }
    }

    /// Tells the volume. Before its device is made: that reads from it at once.
    pub(super) async fn tell_direct(&self) {
        let on = self.direct == Some(Ok(()));
        self.backend.tell(Event::DirectReads(on)).await;
    }

    /// Its device is there, and runs in this mode.
    pub(super) async fn direct_in(&mut self, mode: Mode) {
        let copies = matches!(mode, Mode::UserCopy | Mode::Plain);
        if copies && self.direct == Some(Ok(())) {
            self.direct = Some(Err(format!("the device's data are copied ({mode})")));
            self.tell_direct().await;
        }
    }

    /// What is to be said of a wish that is not met.
    pub(super) fn direct_warning(&self) -> Option<String> {
        let why = self.direct.as_ref()?.as_ref().err()?;
        Some(format!("no direct reads: {why}"))
    }
}
