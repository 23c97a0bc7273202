//! A volume's direct reads: from the chunk's name to the connection that its bytes come on.

use quarry_objfmt::{ChunkId, keys};
use quarry_volume::IoId;

use super::VolumeBackend;
use crate::reactor::Message;
use crate::reactor::direct::Body;

impl VolumeBackend {
    /// Asks for `len` bytes of a chunk and gives the reactor the connection, or the word that there
    /// is none: one of the two, always, for a request waits for it. Why not, the way to the store
    /// has logged.
    pub(super) async fn fetch_direct(&self, io: IoId, chunk: ChunkId, offset: u64, len: u32) {
        let Ok(direct) = &**self.common.direct else {
            return self.tell_direct(io, None).await;
        };
        let object = keys::chunk_key(self.head.tenant(), chunk);
        match direct.ask(&object, offset..offset + u64::from(len)).await {
            Ok((opening, body)) => {
                self.tell_direct(io, Some(body)).await;
                // The reactor tells the volume how it went.
                drop(opening.finish().await);
            }
            Err(_) => self.tell_direct(io, None).await,
        }
    }

    async fn tell_direct(&self, io: IoId, body: Option<Body>) {
        let key = self.key;
        // The reactor is gone only when the daemon ends.
        let _ = self.reactor.send(Message::Direct { key, io, body }).await;
    }
}
